// Means and variances of channels, and sums over pixels: tile by tile, merged in a fixed order.
//
// Source of the merge: Chan et al. 1979.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// Of a tensor [rows, channels] that is made in segments, by whichever threads.
class Statistics {
 public:
  static constexpr int64_t kSegments = 256;  // at most; the result depends on how many, not on the threads

  void begin(int64_t segments, int64_t channels) {
    channels_ = channels;
    padded_ = round_up(channels, Isa::kLanes);
    counts_.assign(segments, 0);
    parts_ = memory_.get<float>(2 * segments * padded_);
    std::memset(parts_, 0, 2 * segments * padded_ * sizeof(float));
  }

  // More rows of a segment, `stride` apart: few enough to be in cache.
  template <class Store>
  void add(int64_t segment, const Store* x, int64_t rows, int64_t stride) {
    float* const mean = parts_ + 2 * segment * padded_;
    float* const m2 = mean + padded_;
    const float before = static_cast<float>(counts_[segment]), total = before + static_cast<float>(rows);
    counts_[segment] += rows;
    const Vector per_row = Isa::broadcast(1 / static_cast<float>(rows));
    const Vector share = Isa::broadcast(static_cast<float>(rows) / total);
    const Vector weight = Isa::broadcast(before * static_cast<float>(rows) / total);
    for (int64_t c = 0; c < channels_; c += Isa::kLanes) {
      const int64_t count = channels_ - c;
      Vector sum = Isa::zero(), squares = Isa::zero();
      for (int64_t row = 0; row < rows; ++row) sum = Isa::add(sum, load_up_to(x + row * stride + c, count));
      const Vector tile_mean = Isa::mul(sum, per_row);
      for (int64_t row = 0; row < rows; ++row) {
        const Vector centred = Isa::sub(load_up_to(x + row * stride + c, count), tile_mean);
        squares = Isa::multiply_add(centred, centred, squares);
      }
      const Vector old = Isa::load(mean + c), step = Isa::sub(tile_mean, old);
      Isa::store(mean + c, Isa::multiply_add(step, share, old));
      const Vector between = Isa::multiply_add(Isa::mul(step, step), weight, squares);
      Isa::store(m2 + c, Isa::add(Isa::load(m2 + c), between));
    }
  }

  // Mean and biased variance of everything.
  void finish(float* mean_out, float* var_out) const {
    std::vector<double> mean(channels_), m2(channels_);
    double total = 0;
    for (size_t segment = 0; segment < counts_.size(); ++segment) {
      const auto rows = static_cast<double>(counts_[segment]);
      if (rows == 0) continue;
      const float* const part = parts_ + 2 * segment * padded_;
      const double share = rows / (total + rows), weight = total * share;
      for (int64_t c = 0; c < channels_; ++c) {
        const double step = part[c] - mean[c];
        mean[c] += step * share;
        m2[c] += part[padded_ + c] + step * step * weight;
      }
      total += rows;
    }
    for (int64_t c = 0; c < channels_; ++c) {
      mean_out[c] = static_cast<float>(mean[c]);
      var_out[c] = static_cast<float>(m2[c] / total);
    }
  }

 private:
  Buffer memory_;
  std::vector<int64_t> counts_;
  int64_t channels_ = 0, padded_ = 0;
  float* parts_ = nullptr;
};

// Sums that every thread gathers for itself: `size` floats for each of `slots`, zeros at first.
class Sums {
 public:
  void begin(int64_t slots, int64_t size) {
    slots_ = slots;
    size_ = round_up(size, kCacheLine / sizeof(float));
    data_ = memory_.get<float>(slots_ * size_);
  }
  float* clear(int64_t slot) {  // by the thread that will add to it
    std::memset(of(slot), 0, size_ * sizeof(float));
    return of(slot);
  }
  float* of(int64_t slot) { return data_ + slot * size_; }

  // The total of kLanes of them, in the order of the slots.
  Vector total(int64_t i) const {
    Vector sum = Isa::load(data_ + i);
    for (int64_t slot = 1; slot < slots_; ++slot) sum = Isa::add(sum, Isa::load(data_ + slot * size_ + i));
    return sum;
  }

 private:
  Buffer memory_;
  int64_t slots_ = 0, size_ = 0;
  float* data_ = nullptr;
};

template <class Store>
void channel_stats(const StatsArgs& p, ParallelFor parallel_for) {
  constexpr int64_t kTile = 128;
  const Team team{parallel_for, p.threads};
  const int64_t tiles = ceil_div(p.rows, kTile), segments = std::min(tiles, Statistics::kSegments);
  Statistics statistics;
  statistics.begin(segments, p.channels);
  team.run(segments, [&](int64_t begin, int64_t end) {
    for (int64_t segment = begin; segment < end; ++segment)
      for (int64_t tile = tiles * segment / segments; tile < tiles * (segment + 1) / segments; ++tile) {
        const int64_t first = tile * kTile, rows = std::min(kTile, p.rows - first);
        statistics.add(segment, static_cast<const Store*>(p.x) + first * p.channels, rows, p.channels);
      }
  });
  statistics.finish(p.mean, p.var);
}
