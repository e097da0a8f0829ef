// A dense block at inference over one shared buffer X, [M, C_L]: see kernels/contract.py for the letters.
//
//   u = relu(affine2(relu(affine1(X[:, :C_l])) W1))     strips of pixels; the prologue makes z in cache
//   X[:, C_l : C_l + k] = conv3x3(u, W2)                rows of pixels, or tiles of 2x2 (Winograd, floats)
//
// Images are independent: each thread takes its own through all layers while they are in its cache. Where there
// are fewer images than threads, the threads share each image, one step of a layer after another.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

template <class Store, class Round, class Word>
class DenseBlock {
  using Element = typename Word::Element;
  static constexpr bool kPaired = std::is_same_v<Store, BFloat16> && std::is_same_v<Element, BFloat16>;
  using Prologue = std::conditional_t<kPaired, PairedAffine, Affine>;
  static constexpr int64_t kStrip = Isa::kStrip;     // pixels whose prologue is made at once
  static constexpr int64_t kTiles = 2 * Isa::kRows;  // 2x2 tiles that are transformed at once
  static constexpr int64_t kFewPixels = 196;         // below which several images share each reading of a weight

 public:
  DenseBlock(const DenseBlockArgs& args, ParallelFor parallel_for)
      : p_(args),
        team_{parallel_for, args.threads},
        slice_(args.height * args.width),
        pixels_(args.depth * slice_),
        channels_(args.features.channels()),
        has_bottleneck_(args.bottleneck_channels > 0),
        x_(static_cast<const Store*>(args.x)),
        out_(static_cast<Store*>(args.out)) {
    const int64_t widest = has_bottleneck_ ? p_.bottleneck_channels : channels(layers() - 1);
    u_channels_ = padded<Word>(widest);
    make_affines();
  }

  void run() {
    const int64_t threads = std::max<int64_t>(1, team_.threads);
    const int64_t together = p_.images / threads * threads;  // the rest is shared image by image
    const int64_t group = std::max<int64_t>(1, std::min(kFewPixels / pixels_, p_.images / threads));
    team_.run(together ? threads : 0, [&](int64_t begin, int64_t end) {
      const int64_t last = together * end / threads;
      for (int64_t image = together * begin / threads; image < last; image += group)
        run_images(image, std::min(group, last - image), team_.alone());
    });
    for (int64_t image = together; image < p_.images; ++image) run_images(image, 1, team_);
  }

 private:
  void make_affines() {
    int64_t size = 0;
    for (int64_t layer = 0; layer < layers(); ++layer)
      size += 2 * (padded<Word>(channels(layer)) + (has_bottleneck_ ? u_channels_ : 0));
    float* next = vectors_.get<float>(size);
    const auto make = [&](const Norm& norm, int64_t channels, int64_t padded_channels) {
      const Affine made{next, next + padded_channels};
      affine(norm, p_.norm_dtype, channels, padded_channels, next, next + padded_channels);
      next += 2 * padded_channels;
      return made;
    };
    for (int64_t layer = 0; layer < layers(); ++layer) {
      const int64_t c = channels(layer);
      float* const vectors = next;
      const Affine made = make(p_.norm1[layer], c, padded<Word>(c));
      if constexpr (kPaired) PairedAffine::arrange(vectors, next - vectors);
      norm1_.push_back({made.scale, made.shift});
      if (has_bottleneck_) norm2_.push_back(make(p_.norm2[layer], p_.bottleneck_channels, u_channels_));
    }
  }

  int64_t layers() const { return p_.features.layers; }
  int64_t channels(int64_t layer) const { return p_.features.channels_before(layer); }  // that it reads

  void run_images(int64_t image, int64_t count, const Team& team) {
    const Window<Word> widest{count, p_.depth, p_.height, p_.width, p_.conv3_depth / 2, p_.conv3_height / 2,
                              u_channels_, u_channels_};
    Element* const u = Scratch::of_this_thread().u.template get<Element>(widest.size());
    std::memset(static_cast<void*>(u), 0, widest.size() * sizeof(Element));
    copy_input(image * pixels_, count * pixels_, team);
    for (int64_t layer = 0; layer < layers(); ++layer) {
      Window<Word> window = widest;
      if (!has_bottleneck_) window.channels = padded<Word>(channels(layer));
      make_u(layer, image, window, u, team);
      convolve_window(layer, image, window, u, team);
    }
  }

  void copy_input(int64_t first, int64_t rows, const Team& team) {
    const int64_t c0 = p_.features.input_channels;
    Store* const target = out_ + p_.features.read_by(0);
    team.run(rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = first + begin; row < first + end; ++row)
        std::memcpy(static_cast<void*>(target + row * channels_), x_ + row * c0, c0 * sizeof(Store));
    });
  }

  void make_u(int64_t layer, int64_t image, const Window<Word>& window, Element* u, const Team& team) {
    const int64_t rows = window.images * pixels_, strips = team.pieces(rows, kStrip);
    team.run(strips, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      Ahead weights = weights_after_conv1(layer, window);
      const Store* const x = out_ + image * pixels_ * channels_ + p_.features.read_by(layer);
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = rows * strip / strips, last = rows * (strip + 1) / strips;
        make_u_strip(layer, x + first * channels_, window, first, last - first, u, weights);
      }
    });
  }

  // What is multiplied after the 1x1 of a layer: few images come back to a weight when the caches have lost it.
  Ahead weights_after_conv1(int64_t layer, const Window<Word>& window) const {
    Ahead weights;
    if (!has_bottleneck_) return weights;
    const int64_t slices = 2 * window.reach_z + 1, in = slices * window.channels;
    const int64_t columns = round_up(p_.features.growth_rate, Isa::kLanes);
    const auto* const conv3 = static_cast<const Element*>(p_.conv3[layer]);
    if (window.by_winograd())
      weights.add(conv3 + places_start(in, columns), places_of(slices) * window.channels, columns, columns);
    else
      weights.add(conv3, 3 * (2 * window.reach_y + 1) * in, columns, columns);
    if (layer + 1 < layers()) {
      const int64_t hidden = round_up(p_.bottleneck_channels, Isa::kLanes);
      weights.add(static_cast<const Element*>(p_.conv1[layer + 1]), padded<Word>(channels(layer + 1)), hidden, hidden);
    }
    return weights;
  }

  void make_u_strip(int64_t layer, const Store* x, const Window<Word>& window, int64_t first, int64_t rows, Element* u,
                    Ahead& weights) {
    const int64_t c = channels(layer), columns = round_up(p_.bottleneck_channels, Isa::kLanes);
    const Prologue& norm = norm1_[layer];
    const float* h = nullptr;
    if (has_bottleneck_)
      h = multiply_strip<Word>(rows, padded<Word>(c), columns, p_.conv1[layer],
                               [&](int64_t row, int64_t start, int64_t depth, Element* z) {
                                 affine_relu_row(x + row * channels_ + start, norm.from(start),
                                                 std::min(depth, c - start), depth, z);
                               },
                               &weights);
    int64_t slice = first / slice_, i = first % slice_ / p_.width, j = first % p_.width;
    Element* target = u + window.pixel(slice, i, j) * window.stride;
    for (int64_t row = 0; row < rows; ++row) {
      if (has_bottleneck_)
        affine_relu_row(h + row * columns, norm2_[layer], p_.bottleneck_channels, window.channels, target);
      else
        affine_relu_row(x + row * channels_, norm, c, window.channels, target);
      target += window.stride;
      if (++j < p_.width) continue;
      j = 0;
      if (++i == p_.height) i = 0, ++slice;
      target = u + window.pixel(slice, i, j) * window.stride;
    }
  }

  void convolve_window(int64_t layer, int64_t image, const Window<Word>& window, const Element* u, const Team& team) {
    const int64_t columns = round_up(p_.features.growth_rate, Isa::kLanes);
    const auto store = [&](int64_t slice, int64_t y, const float* row) {
      Store* target = out_ + (image * pixels_ + slice * slice_ + y * p_.width) * channels_ + p_.features.made_by(layer);
      for (int64_t x = 0; x < p_.width; ++x, target += channels_)
        store_row<Round>(row + x * columns, p_.features.growth_rate, target);
    };
    if constexpr (kIsWinograd<Word>)
      if (window.by_winograd()) {
        const int64_t bands = window.bands();
        const int64_t pieces = team.pieces(bands, std::max<int64_t>(1, kTiles / window.tiles_across()));
        team.run(pieces, [&](int64_t begin, int64_t end) {
          for (int64_t piece = begin; piece < end; ++piece)
            convolve_by_winograd(window, u, p_.conv3[layer], columns, bands * piece / pieces,
                                 bands * (piece + 1) / pieces, store);
        });
        return;
      }
    team.run(window.rows(), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      convolve_directly(window, u, p_.conv3[layer], columns, begin, end, store);
    });
  }

  const DenseBlockArgs& p_;
  const Team team_;
  const int64_t slice_, pixels_, channels_;  // slice_, pixels_: of an image
  const bool has_bottleneck_;
  const Store* const x_;
  Store* const out_;
  int64_t u_channels_;
  Buffer vectors_;
  std::vector<Prologue> norm1_;
  std::vector<Affine> norm2_;
};
