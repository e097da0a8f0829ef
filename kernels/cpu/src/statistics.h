// Means and variances of channels, and sums over pixels: tile by tile, merged in a fixed order.
//
// Source of the merge: Chan et al. 1979.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// Of a tensor [rows, channels] that is made in segments, by whichever threads. Summed in double precision.
class Statistics {
 public:
  static constexpr int64_t kSegments = 128;  // at most; the result depends on how many, not on the threads

  void begin(int64_t segments, int64_t channels) {
    channels_ = channels;
    padded_ = round_up(channels, Isa::kLanes);
    counts_.assign(segments, 0);
    parts_ = memory_.get<double>(2 * segments * padded_);
    std::memset(parts_, 0, 2 * segments * padded_ * sizeof(double));
  }

  // More rows of a segment, `stride` apart: few enough to be in cache.
  template <class Store>
  void add(int64_t segment, const Store* x, int64_t rows, int64_t stride) {
    double* const mean = parts_ + 2 * segment * padded_;
    const double before = static_cast<double>(counts_[segment]), count = static_cast<double>(rows);
    counts_[segment] += rows;
    for (int64_t c = 0; c < channels_; c += Isa::kLanes) {
      const auto at = [&](int64_t row) { return load_up_to(x + row * stride + c, channels_ - c); };
      const typename Isa::Wide sum = sum_of<Store>(rows, at);
      double tile_mean[Isa::kLanes], tile_m2[Isa::kLanes];
      float rounded[Isa::kLanes];
      Isa::wide_store(tile_mean, sum);
      for (int lane = 0; lane < Isa::kLanes; ++lane) tile_mean[lane] /= count;
      for (int lane = 0; lane < Isa::kLanes; ++lane) rounded[lane] = static_cast<float>(tile_mean[lane]);
      const Vector centre = Isa::load(rounded);
      Isa::wide_store(tile_m2, sum_of<Store>(rows, [&](int64_t row) {
        const Vector centred = Isa::sub(at(row), centre);
        return Isa::mul(centred, centred);
      }));
      for (int lane = 0; lane < Isa::kLanes; ++lane) {
        const double off = tile_mean[lane] - rounded[lane];
        tile_m2[lane] -= count * off * off;
      }
      merge(Isa::kLanes, before, count, tile_mean, tile_m2, mean + c, mean + padded_ + c);
    }
  }

  // Mean and biased variance of everything.
  void finish(float* mean_out, float* var_out) const {
    std::vector<double> mean(padded_), m2(padded_);
    double total = 0;
    for (size_t segment = 0; segment < counts_.size(); ++segment) {
      const double* const own = parts_ + 2 * segment * padded_;
      if (counts_[segment] == 0) continue;
      merge(padded_, total, static_cast<double>(counts_[segment]), own, own + padded_, mean.data(), m2.data());
      total += static_cast<double>(counts_[segment]);
    }
    for (int64_t c = 0; c < channels_; ++c) {
      mean_out[c] = static_cast<float>(mean[c]);
      var_out[c] = static_cast<float>(m2[c] / total);
    }
  }

 private:
  // The sum of value(row): of narrow stored values few at a time in floats, which have digits to spare for those.
  template <class Store, class Value>
  static typename Isa::Wide sum_of(int64_t rows, const Value& value) {
    constexpr int64_t kTogether = sizeof(Store) < sizeof(float) ? 8 : 1;
    typename Isa::Wide sum = Isa::wide_zero();
    for (int64_t row = 0; row < rows; row += kTogether) {
      Vector few = value(row);
      for (int64_t i = row + 1; i < std::min(rows, row + kTogether); ++i) few = Isa::add(few, value(i));
      sum = Isa::wide_add(sum, few);
    }
    return sum;
  }

  // Adds `count` values of each channel to the `before` values of (mean, m2).
  static void merge(int64_t channels, double before, double count, const double* mean, const double* m2, double* to_mean,
                    double* to_m2) {
    const double share = count / (before + count), weight = before * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double step = mean[c] - to_mean[c];
      to_mean[c] += step * share;
      to_m2[c] += m2[c] + step * step * weight;
    }
  }

  Buffer memory_;
  std::vector<int64_t> counts_;
  int64_t channels_ = 0, padded_ = 0;
  double* parts_ = nullptr;
};

inline constexpr int64_t kSummedInFloats = 16;  // pixels of a norm's sums, before they are added up in double precision

// Sums that every thread gathers for itself: `size` numbers for each of `slots`. A weight's gradient in floats; a
// norm's, whose terms are many and whose error reaches every pixel, in double precision.
template <class T>
class Sums {
 public:
  void begin(int64_t slots, int64_t size) {
    slots_ = slots;
    size_ = round_up(size, kCacheLine / sizeof(T));
    data_ = memory_.get<T>(slots_ * size_);
  }
  T* clear(int64_t slot) {  // by the thread that will add to it
    T* const own = data_ + slot * size_;
    std::memset(own, 0, size_ * sizeof(T));
    return own;
  }

  // The total of the i-th number, of floats kLanes from it on, in the order of the slots.
  auto total(int64_t i) const {
    if constexpr (std::is_same_v<T, double>) {
      double sum = 0;
      for (int64_t slot = 0; slot < slots_; ++slot) sum += data_[slot * size_ + i];
      return sum;
    } else {
      Vector sum = Isa::load(data_ + i);
      for (int64_t slot = 1; slot < slots_; ++slot) sum = Isa::add(sum, Isa::load(data_ + slot * size_ + i));
      return sum;
    }
  }

 private:
  Buffer memory_;
  int64_t slots_ = 0, size_ = 0;
  T* data_ = nullptr;
};

inline void add_wide(double* sum, Vector v) { Isa::wide_store(sum, Isa::wide_add(Isa::wide_load(sum), v)); }

// What the gradients of a norm's kLanes channels sum over pixels, few of them at a time: da, and da (x - mean).
struct NormSums {
  Vector mean, s1 = Isa::zero(), s2 = Isa::zero();

  explicit NormSums(const float* mean) : mean(Isa::load(mean)) {}

  void add(Vector x, Vector da) {
    s1 = Isa::add(s1, da);
    s2 = Isa::multiply_add(da, Isa::sub(x, mean), s2);
  }

  void add_to(double* to_s1, double* to_s2) const {
    add_wide(to_s1, s1);
    add_wide(to_s2, s2);
  }
};

template <class Store>
void channel_stats(const StatsArgs& p, ParallelFor parallel_for) {
  constexpr int64_t kTile = 128;
  const Team team{parallel_for, p.threads};
  const int64_t tiles = ceil_div(p.rows, kTile), segments = std::min(tiles, Statistics::kSegments);
  Statistics statistics;
  statistics.begin(segments, p.channels);
  team.run_parts(segments, tiles, [&](int64_t segment, int64_t begin, int64_t end) {
    for (int64_t first = begin * kTile; first < std::min(end * kTile, p.rows); first += kTile) {
      const int64_t rows = std::min(kTile, p.rows - first);
      statistics.add(segment, static_cast<const Store*>(p.x) + first * p.channels, rows, p.channels);
    }
  });
  statistics.finish(p.mean, p.var);
}
