// A dense block in training, over one shared buffer X, [M, C_L], and its gradient G: see kernels/contract.py for the
// letters and kernels/portable/batch_norm.py for the formulas.
//
// Forward, for each layer two passes over the batch, each making the statistics of what it stores:
//
//   h = relu(norm1(X[:, :C_l])) W1                      strips of pixels
//   X[:, C_l : C_l + k] = conv3x3(relu(norm2(h)), W2)   windows of pixels
//
// Backward, for each layer from the last two passes:
//
//   dy = G[:, C_l : C_l + k] + P + Q (x - mean); da2 = conv3x3^T(dy, W2) 1[u > 0]; dW2    windows
//   dh = norm2's gradient of da2; G[:, :C_l] += scale1 da1, da1 = (dh W1^T) 1[z > 0]; dW1  strips; X and G pass once
//
// What norm1's statistics let through to X is gathered in vectors P and Q and added where a gradient is consumed.
// Without bottlenecks the 3x3 reads X itself. Weights' gradients are summed by each thread, then over the threads in
// order: a result depends on how many there are, and on nothing else.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// A batch cut into windows for 3x3 convolutions: some images each, some slices of one, or an even number of rows of a
// slice, or of `together` slices, which are not parted.
class Windows {
 public:
  Windows(int64_t images, int64_t depth, int64_t height, int64_t width, int64_t threads, int64_t together)
      : images_(images), depth_(depth), height_(height), together_(together) {
    constexpr int64_t kTiles = 96;  // of 2x2 pixels, that a window should have
    const int64_t across = ceil_div(width, 2) * together, bands = ceil_div(height, 2), tiles = across * bands;
    const int64_t layers = ceil_div(depth, together);
    if (tiles * layers >= kTiles) {
      slice_parts_ = tiles >= kTiles ? ceil_div(bands, std::max<int64_t>(1, kTiles / across)) : 1;
      depth_parts_ = ceil_div(layers, std::max<int64_t>(1, kTiles / tiles));
      count_ = images * depth_parts_ * slice_parts_;
    } else {
      const int64_t of_images = std::min(kTiles / (tiles * layers), std::max<int64_t>(1, images / threads));
      count_ = ceil_div(images, of_images);
    }
  }

  struct Place {
    int64_t image, images, front, slices, top, rows;
  };
  int64_t count() const { return count_; }
  Place operator[](int64_t i) const {
    if (depth_parts_ == 0) {
      const int64_t image = images_ * i / count_;
      return {image, images_ * (i + 1) / count_ - image, 0, depth_, 0, height_};
    }
    const int64_t bands = ceil_div(height_, 2), row_part = i % slice_parts_, part = i / slice_parts_ % depth_parts_;
    const int64_t top = bands * row_part / slice_parts_ * 2;
    const int64_t bottom = std::min(height_, bands * (row_part + 1) / slice_parts_ * 2);
    const int64_t layers = ceil_div(depth_, together_), front = layers * part / depth_parts_ * together_;
    const int64_t back = std::min(depth_, layers * (part + 1) / depth_parts_ * together_);
    return {i / slice_parts_ / depth_parts_, 1, front, back - front, top, bottom - top};
  }

 private:
  int64_t images_, depth_, height_, together_, count_, depth_parts_ = 0, slice_parts_ = 0;
};

template <class Store, class Round, class Word>
class TrainingBlock {
  using Element = typename Word::Element;
  using Gradient = std::conditional_t<std::is_same_v<Store, BFloat16>, BFloat16, float>;  // float16 may overflow
  using Place = Windows::Place;
  static constexpr int64_t kAhead = 16;              // pixels, that are asked for before they are read
  static constexpr int64_t kTiles = 2 * Isa::kRows;  // Winograd's tiles that are transformed at once

 public:
  TrainingBlock(const TrainingArgs& args, ParallelFor parallel_for)
      : p_(args),
        team_{parallel_for, args.threads},
        slice_(args.height * args.width),
        pixels_(args.images * args.depth * slice_),
        channels_(args.features.channels()),
        hidden_(args.bottleneck_channels),
        hidden_padded_(stride_of<Word>(hidden_)),
        hidden_columns_(round_up(hidden_, Isa::kLanes)),
        growth_(args.features.growth_rate),
        growth_columns_(round_up(growth_, Isa::kLanes)),
        x_(static_cast<Store*>(args.out)),
        grad_(static_cast<Gradient*>(args.grad)),
        windows_(args.images, args.depth, args.height, args.width, args.threads,
                 kIsWinograd<Word> && args.layer[0].conv3.depth > 1 ? 2 : 1),
        reach_z_(args.layer[0].conv3.depth / 2),
        reach_y_(args.layer[0].conv3.height / 2),
        shares_statistics_(std::any_of(args.layer, args.layer + args.features.layers,
                                       [](const TrainingLayer& layer) { return layer.batch1 != 0; })) {}

  void forward() {
    prefer_huge_pages(x_, pixels_ * channels_ * sizeof(Store));
    copy_input();
    for (int64_t i = 0; i < p_.features.layers; ++i) {
      const TrainingLayer& layer = p_.layer[i];
      const int64_t c = channels(i);
      read_ = p_.features.read_by(i);
      norm1_.set(layer.norm1, c, stride_of<Word>(c));
      if (hidden_ > 0) {
        make_bottleneck(i, layer.batch2 != 0);
        norm2_.set(layer.norm2, hidden_, hidden_padded_);
        grow(i, static_cast<const Round*>(layer.bottleneck), hidden_, hidden_, norm2_);
      } else {
        grow(i, x_ + read_, channels_, c, norm1_);
      }
    }
  }

  void backward() {
    prefer_huge_pages(grad_, pixels_ * channels_ * sizeof(Gradient));
    through_.assign(2 * round_up(channels_, Isa::kLanes), 0.f);
    for (int64_t i = p_.features.layers; i-- > p_.first_layer;) {
      const TrainingLayer& layer = p_.layer[i];
      read_ = p_.features.read_by(i);
      arriving_ = i == p_.features.layers - 1 ? static_cast<const Gradient*>(p_.grad_out) : grad_;
      add_up_through(made_by(i), growth_);
      norm1_.set(layer.norm1, channels(i), stride_of<Word>(channels(i)));
      if (hidden_ > 0) {
        if (!p_.keeps_bottlenecks) make_bottleneck(i, false);
        norm2_.set(layer.norm2, hidden_, hidden_padded_);
        shrink(i, static_cast<const Round*>(layer.bottleneck), hidden_, hidden_, norm2_);
        if (layer.batch2 && p_.add_up != nullptr)
          p_.add_up(own_through_.data(), own_through_.data() + hidden_padded_, hidden_);
        undo_bottleneck(i);
      } else {
        shrink(i, x_ + read_, channels_, channels(i), norm1_);
      }
    }
    arriving_ = grad_;
    if (p_.dx == nullptr) return;
    add_up_through(p_.features.read_by(0), p_.features.input_channels);
    make_dx();
  }

 private:
  int64_t channels(int64_t layer) const { return p_.features.channels_before(layer); }  // that it reads
  int64_t made_by(int64_t layer) const { return p_.features.made_by(layer); }

  // -- forward --------------------------------------------------------------------------------------------------

  void copy_input() {
    constexpr int64_t kTile = 64;
    const int64_t c0 = p_.features.input_channels, read = p_.features.read_by(0);
    const int64_t tiles = ceil_div(pixels_, kTile), segments = std::min(tiles, Statistics::kSegments);
    statistics_.begin(segments, c0);
    team_.run_parts(segments, tiles, [&](int64_t segment, int64_t begin, int64_t end) {
      for (int64_t first = begin * kTile; first < std::min(end * kTile, pixels_); first += kTile) {
        const int64_t rows = std::min(kTile, pixels_ - first);
        const Store* const x = static_cast<const Store*>(p_.x) + first * c0;
        for (int64_t row = 0; row < rows; ++row)
          std::memcpy(static_cast<void*>(x_ + (first + row) * channels_ + read), x + row * c0, c0 * sizeof(Store));
        if (shares_statistics_) statistics_.add(segment, x, rows, c0);
      }
    });
    if (shares_statistics_) finish_statistics(p_.mean + read, p_.var + read, c0);
  }

  void make_bottleneck(int64_t i, bool with_statistics) {
    const TrainingLayer& layer = p_.layer[i];
    const int64_t c = channels(i);
    auto* const h = static_cast<Round*>(layer.bottleneck);
    prefer_huge_pages(h, pixels_ * hidden_ * sizeof(Round));
    const void* const w = pack_in_parallel<Word>(layer.conv1, team_, packed_);
    const int64_t strips = team_.pieces(pixels_, kTrainingStrip);
    const int64_t segments = std::min(strips, Statistics::kSegments);
    statistics_.begin(segments, hidden_);
    team_.run_parts(segments, strips, [&](int64_t segment, int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = pixels_ * strip / strips, rows = pixels_ * (strip + 1) / strips - first;
        const Store* const x = x_ + first * channels_ + read_;
        Ahead ahead;
        ahead.add(h + first * hidden_, rows, hidden_, hidden_);
        if (strip + 1 < strips) ahead.add(x + rows * channels_, rows, channels_, c);
        float* const product = multiply_strip<Word>(
            rows, depth_of<Word>(c), hidden_columns_, w,
            [&](int64_t row, int64_t start, int64_t depth, Element* z) {
              prefetch(x + (row + kAhead) * channels_ + start, std::min(depth, c - start));
              affine_relu_row(x + row * channels_ + start, norm1_.from(start), std::min(depth, c - start), depth, z);
            },
            &ahead);
        for (int64_t row = 0; row < rows; ++row) {
          drop(product + row * hidden_columns_, layer.bottleneck_mask, first + row, hidden_);
          store_row<Round>(product + row * hidden_columns_, hidden_, h + (first + row) * hidden_);
        }
        if (with_statistics) statistics_.add(segment, h + first * hidden_, rows, hidden_);
      }
    });
    if (with_statistics) finish_statistics(p_.bottleneck_mean + i * hidden_, p_.bottleneck_var + i * hidden_, hidden_);
  }

  // The 3x3 of a layer, from c channels of `source`, to the new channels of X.
  template <class Source>
  void grow(int64_t i, const Source* source, int64_t stride, int64_t c, const Normalization& norm) {
    const TrainingLayer& layer = p_.layer[i];
    const void* const w = pack_in_parallel<Word>(layer.conv3, team_, packed_);
    Store* const y = x_ + made_by(i);
    const int64_t segments = std::min(windows_.count(), Statistics::kSegments);
    statistics_.begin(segments, growth_);
    team_.run_parts(segments, windows_.count(), [&](int64_t segment, int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      for (int64_t n = begin; n < end; ++n) {
        const Place place = windows_[n];
        const Window<Word> window = padded_window(place, c);
        const Element* const u = make_u(place, window, source, stride, c, norm);
        convolve_in_parts(window, u, w, growth_columns_, [&](int64_t slice, int64_t row, float* values) {
          const int64_t first = pixel(place, slice, row);
          for (int64_t j = 0; j < p_.width; ++j) {
            drop(values + j * growth_columns_, layer.growth_mask, first + j, growth_);
            store_row<Round>(values + j * growth_columns_, growth_, y + (first + j) * channels_);
          }
        });
        if (shares_statistics_)
          each_run(place, [&](int64_t first, int64_t pixels) {
            statistics_.add(segment, y + first * channels_, pixels, channels_);
          });
      }
    });
    if (shares_statistics_) finish_statistics(p_.mean + made_by(i), p_.var + made_by(i), growth_);
  }

  void finish_statistics(float* mean, float* var, int64_t c) {
    statistics_.finish(mean, var);
    if (p_.merge != nullptr) p_.merge(mean, var, c);
  }

  // -- backward -------------------------------------------------------------------------------------------------

  // P and Q of channels whose gradient is consumed next.
  void add_up_through(int64_t first, int64_t count) {
    float* const p = through_.data() + first;
    if (shares_statistics_ && p_.add_up != nullptr) p_.add_up(p, p + through_.size() / 2, count);
  }

  // The 3x3 of a layer backwards: to da of its bottleneck, or without one to G; its norm's gradients.
  template <class Source>
  void shrink(int64_t i, const Source* source, int64_t stride, int64_t c, const Normalization& norm) {
    const TrainingLayer& layer = p_.layer[i];
    const int64_t c_padded = stride_of<Word>(c), columns = round_up(c, Isa::kLanes);
    const bool wants_weight = layer.conv3_weight != nullptr;
    const void* const w = pack_in_parallel<Word>(transposed(layer.conv3), team_, packed_);
    if (hidden_ > 0) da_ = da_memory_.get<Element>(pixels_ * hidden_columns_);
    sums_.begin(team_.threads, 2 * c_padded);
    if (wants_weight) weight_sums_.begin(team_.threads, conv3_sum_size(columns));
    team_.run_parts(team_.threads, windows_.count(), [&](int64_t slot, int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      double* const s1 = sums_.clear(slot);
      double* const s2 = s1 + c_padded;
      float* const weight_sum = wants_weight ? weight_sums_.clear(slot) : nullptr;
      for (int64_t n = begin; n < end; ++n) {
        const Place place = windows_[n];
        const Window<Word> window = padded_window(place, growth_);
        const Element* const dy = make_dy(i, place, window);
        Ahead masked, arriving;
        each_run(place, [&](int64_t first, int64_t pixels) {
          masked.add(source + first * stride, pixels, stride, c);
          if (hidden_ > 0) masked.add(da_ + first * hidden_columns_, pixels, hidden_columns_, hidden_columns_);
          else masked.add(arriving_ + first * channels_ + read_, pixels, channels_, c);
        });
        if (n + 1 < end)
          each_run(windows_[n + 1], [&](int64_t first, int64_t pixels) {
            arriving.add(x_ + first * channels_ + made_by(i), pixels, channels_, growth_);
            arriving.add(arriving_ + first * channels_ + made_by(i), pixels, channels_, growth_);
          });
        const auto mask = [&](int64_t slice, int64_t row, const float* du) {
          const int64_t first = pixel(place, slice, row);
          const Source* const x = source + first * stride;
          if (hidden_ > 0)
            mask_row(x, stride, c, norm, du, columns, s1, s2, [&](int64_t at, int64_t channel, Vector da, int64_t) {
              Isa::store(da_ + (first + at) * hidden_columns_ + channel, da);
            });
          else
            mask_row(x, stride, c, norm, du, columns, s1, s2, gather(norm, first));
        };
        convolve_in_parts(window, dy, w, columns, mask, &masked);
        if (wants_weight) add_conv3_gradient(place, window, dy, source, stride, c, norm, weight_sum, &arriving);
      }
    });
    finish_norm(norm, c, c_padded, hidden_ > 0 ? layer.norm2_weight : layer.norm1_weight,
                hidden_ > 0 ? layer.norm2_bias : layer.norm1_bias);
    if (hidden_ == 0 && layer.batch1) share_through(c);
    if (wants_weight) finish_conv3(c, columns, layer.conv3_weight);
  }

  // da = du 1[u > 0] of a row of pixels, handed to use(pixel, channel, da, how many exist); adds up s1 and, but for
  // rstd, s2.
  template <class Source, class Use>
  void mask_row(const Source* x, int64_t stride, int64_t c, const Normalization& norm, const float* du,
                int64_t columns, double* s1, double* s2, const Use& use) {
    for (int64_t block = 0; block < p_.width; block += kSummedInFloats)
      for (int64_t v = 0; v < columns; v += Isa::kLanes) {
        NormSums sums(norm.mean + v);
        for (int64_t j = block; j < std::min(p_.width, block + kSummedInFloats); ++j) {
          const Vector value = load_up_to(x + j * stride + v, c - v);
          const Vector da = Isa::where_positive(norm(value, v), Isa::load(du + j * columns + v));
          sums.add(value, da);
          use(j, v, da, c - v);
        }
        sums.add_to(s1 + v, s2 + v);
      }
  }

  // Adds scale * da to G, at pixels from `first`.
  auto gather(const Normalization& norm, int64_t first) {
    return [this, &norm, first](int64_t at, int64_t channel, Vector da, int64_t exist) {
      const int64_t element = (first + at) * channels_ + read_ + channel;
      const Vector g = load_up_to(arriving_ + element, exist);
      store_up_to(grad_ + element, Isa::multiply_add(da, Isa::load(norm.scale + channel), g), exist);
    };
  }

  // The 1x1 of a layer backwards, from da of its bottleneck to G, in one pass over X; its gradient and norm1's.
  void undo_bottleneck(int64_t i) {
    const TrainingLayer& layer = p_.layer[i];
    const int64_t c = channels(i), c_padded = stride_of<Word>(c), columns = round_up(c, Isa::kLanes);
    const bool wants_weight = layer.conv1_weight != nullptr;
    const void* const w = pack_in_parallel<Word>(transposed(layer.conv1), team_, packed_);
    sums_.begin(team_.threads, 2 * c_padded);
    if (wants_weight) weight_sums_.begin(team_.threads, weight_sum_size(hidden_, columns));
    const int64_t strips = team_.pieces(pixels_, kTrainingStrip);
    team_.run_parts(team_.threads, strips, [&](int64_t slot, int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      double* const s1 = sums_.clear(slot);
      double* const s2 = s1 + c_padded;
      float* const weight_sum = wants_weight ? weight_sums_.clear(slot) : nullptr;
      Element* const dh = Scratch::of_this_thread().dy.get<Element>(kTrainingStrip * hidden_padded_);
      const auto* const h = static_cast<const Round*>(layer.bottleneck);
      Ahead ahead;
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = pixels_ * strip / strips, rows = pixels_ * (strip + 1) / strips - first;
        make_dh(layer, first, rows, dh);
        const auto use = [&](int64_t start, int64_t width, const float* dz, const PixelPanels<Word>& z) {
          undo_norm1(first, rows, start, width, c, dz, z, s1, s2);
        };
        const auto add_chunk = [&](Ahead& to, int64_t pixel, int64_t start) {
          const int64_t at = pixel * channels_ + read_ + start, width = gradient_chunk(columns - start);
          to.add(x_ + at, rows, channels_, width).add(arriving_ + at, rows, channels_, width);
        };
        const auto coming = [&](int64_t start) {
          Ahead next;
          if (start < columns) {
            add_chunk(next, first, start);
          } else if (strip + 1 < end) {
            next.add(h + (first + rows) * hidden_, rows, hidden_, hidden_);
            next.add(da_ + (first + rows) * hidden_columns_, rows, hidden_columns_, hidden_columns_);
            add_chunk(next, first + rows, 0);
          }
          return next;
        };
        if (strip == begin) ahead = coming(0);
        undo_multiply<Word>(dh, rows, hidden_, hidden_padded_, w, columns, weight_sum, use, coming, ahead);
      }
    });
    finish_norm(norm1_, c, c_padded, layer.norm1_weight, layer.norm1_bias);
    if (layer.batch1) share_through(c);
    if (wants_weight) finish_conv1(weight_sums_, hidden_, c, team_, layer.conv1_weight);
  }

  // z, and da = dz 1[z > 0] into G and the sums, of some channels of some pixels.
  void undo_norm1(int64_t first, int64_t rows, int64_t start, int64_t width, int64_t c, const float* dz,
                  const PixelPanels<Word>& z, double* s1, double* s2) {
    constexpr int64_t e = Word::kElements;
    constexpr int64_t kTogether = 8;  // pixels between a load and a store of the sums
    const int64_t stride = channels_;
    for (int64_t block = 0; block < rows; block += kTogether)
      for (int64_t v = 0; v < width; v += Isa::kLanes) {
        const int64_t channel = start + v, exist = c - channel;
        // Not members: for all that a compiler knows, a vector's store changes those.
        const int64_t at = first * stride + read_ + channel;
        const Store* const x = x_ + at;
        const Gradient* const arriving = arriving_ + at;
        Gradient* const grad = grad_ + at;
        const Vector scale = Isa::load(norm1_.scale + channel), shift = Isa::load(norm1_.shift + channel);
        const auto column = z.column(v);
        NormSums sums(norm1_.mean + channel);
        const auto undo = [&](int64_t row, auto whole) {  // whether all of a vector's channels exist
          const int64_t count = decltype(whole)::value ? Isa::kLanes : exist;
          __builtin_prefetch(x + (row + kAhead) * stride);
          __builtin_prefetch(arriving + (row + kAhead) * stride);
          const Vector value = load_up_to(x + row * stride, count);
          const Vector activated = Isa::relu(Isa::multiply_add(value, scale, shift));
          const Vector da = Isa::where_positive(activated, Isa::load(dz + row * width + v));
          const Vector g = load_up_to(arriving + row * stride, count);
          store_up_to(grad + row * stride, Isa::multiply_add(da, scale, g), count);
          sums.add(value, da);
          return activated;
        };
        const auto undo_all = [&](auto whole) {
          const int64_t end = std::min(rows, block + kTogether);
          int64_t row = block;
          for (; row + e <= end; row += e) {
            Vector activated[e];
            for (int64_t i = 0; i < e; ++i) activated[i] = undo(row + i, whole);
            column.store(row / e, activated);
          }
          if (row == end) return;
          Vector last[e] = {undo(row, whole)};  // and zeros
          column.store(row / e, last);
        };
        if (exist >= Isa::kLanes) undo_all(std::true_type());
        else undo_all(std::false_type());
        sums.add_to(s1 + channel, s2 + channel);
      }
  }

  // The gradient of h, of some pixels.
  void make_dh(const TrainingLayer& layer, int64_t first, int64_t rows, Element* dh) const {
    const int64_t hidden = hidden_, columns = hidden_columns_;
    const auto* const h = static_cast<const Round*>(layer.bottleneck) + first * hidden;
    const Element* const da = da_ + first * columns;
    const float* const scale = norm2_.scale;
    const ThroughStatistics through{norm2_.mean, own_through_.data(), own_through_.data() + own_through_.size() / 2};
    const bool with_batch = layer.batch2 != 0;
    for (int64_t row = 0; row < rows; ++row)
      write_row(dh + row * hidden_padded_, hidden, hidden_padded_, layer.bottleneck_mask, first + row, [=](int64_t v) {
        const Vector scaled = Isa::mul(Isa::load(da + row * columns + v), Isa::load(scale + v));
        const Vector passed = through(load_up_to(h + row * hidden + v, hidden - v), v);
        return with_batch ? Isa::add(scaled, passed) : scaled;
      });
  }

  void make_dx() {
    const int64_t c0 = p_.features.input_channels;
    with_element_type(p_.dx_dtype, [&](auto* type) {
      using Element = std::remove_pointer_t<decltype(type)>;
      auto* const dx = static_cast<Element*>(p_.dx);
      team_.run(pixels_, [this, c0, dx](int64_t begin, int64_t end) {
        const auto gradient = true_gradient(p_.features.read_by(0));
        for (int64_t at = begin; at < end; ++at)
          for (int64_t v = 0; v < c0; v += Isa::kLanes) store_up_to(dx + at * c0 + v, gradient(at, v, c0 - v), c0 - v);
      });
    });
  }

  // G + P + Q (x - mean) of kLanes channels of a pixel, or of those that exist: a function of the pixel, the channel,
  // from `first`, and how many exist.
  auto true_gradient(int64_t first) const {
    const float* const p = through_.data() + first;
    const ThroughStatistics through{p_.mean + first, p, p + through_.size() / 2};
    const Store* const x = x_ + first;
    const Gradient* const arriving = arriving_ + first;
    return [=, stride = channels_, with_batch = shares_statistics_](int64_t at, int64_t channel, int64_t exist) {
      const int64_t element = at * stride + channel;
      const Vector g = load_up_to(arriving + element, exist);
      return with_batch ? Isa::add(g, through(load_up_to(x + element, exist), channel, exist)) : g;
    };
  }

  // The gradients of the norm at hand; what its statistics let through goes to `own_through_`.
  void finish_norm(const Normalization& norm, int64_t c, int64_t c_padded, float* weight, float* bias) {
    own_through_.resize(2 * c_padded);
    norm_gradients(sums_, norm, pixels_, c, c_padded, weight, bias, own_through_.data(),
                   own_through_.data() + c_padded);
  }

  void share_through(int64_t c) {
    const int64_t own_half = own_through_.size() / 2, half = through_.size() / 2;
    for (int64_t v = 0; v < c; ++v) {
      through_[read_ + v] += own_through_[v];
      through_[half + read_ + v] += own_through_[own_half + v];
    }
  }

  // The weight's gradient of a 3x3: a window's part of it, in Winograd's places or by taps.
  template <class Source>
  void add_conv3_gradient(const Place& place, const Window<Word>& dy_window, const Element* dy, const Source* source,
                          int64_t stride, int64_t c, const Normalization& norm, float* sum, Ahead* ahead) const {
    if constexpr (kIsWinograd<Word>) {
      const Window<Word> window = padded_window(place, c);
      const float* const u = make_u(place, window, source, stride, c, norm);
      if (window.by_winograd())
        add_weight_gradient_in_places(window, u, dy_window, dy, growth_, sum, ahead);
      else
        add_weight_gradient_of_sequences(window, u, dy_window, dy, growth_, sum, ahead);
    } else {
      add_weight_gradient<Word>(
          dy_window, dy, growth_, round_up(c, Isa::kLanes),
          [&](int64_t slice, int64_t z, int64_t y) { return exists(place, slice % place.slices + z, y); },
          [&](int64_t slice, int64_t z, int64_t y, int64_t x, int64_t v) {
            return norm(load_up_to(source + (pixel(place, slice + z, y) + x) * stride + v, c - v), v);
          },
          sum, ahead);
    }
  }

  bool by_winograd() const { return kIsWinograd<Word> && reach_y_ > 0; }

  int64_t conv3_sum_size(int64_t columns) const {
    const int64_t slices = 2 * reach_z_ + 1;
    return (by_winograd() ? places_of(slices) : 9 * slices) * weight_sum_size(growth_, columns);
  }

  // dW2, [k, C, ((3,) 3,) 3], from those parts' sums.
  void finish_conv3(int64_t c, int64_t columns, float* out) {
    const int64_t slices = 2 * reach_z_ + 1, of_slice = 3 * (2 * reach_y_ + 1), taps = slices * of_slice;
    const int64_t size = weight_sum_size(growth_, columns);
    team_.run(growth_, [&](int64_t begin, int64_t end) {
      Vector values[27];
      float tap_values[27][Isa::kLanes];
      for (int64_t n = begin; n < end; ++n)
        for (int64_t v = 0; v < c; v += Isa::kLanes) {
          const auto sum = [&](int64_t i) { return weight_sums_.total(i * size + n * columns + v); };
          if (by_winograd())
            taps_of_places(sum, slices, values);
          else
            for (int64_t tap = 0; tap < taps; ++tap)
              values[tap] = sum(tap / of_slice * 9 + (9 - of_slice) / 2 + tap % of_slice);
          for (int64_t tap = 0; tap < taps; ++tap) Isa::store(tap_values[tap], values[tap]);
          for (int64_t lane = 0; lane < std::min<int64_t>(Isa::kLanes, c - v); ++lane)
            for (int64_t tap = 0; tap < taps; ++tap) out[(n * c + v + lane) * taps + tap] = tap_values[tap][lane];
        }
    });
  }

  // -- what both share ------------------------------------------------------------------------------------------

  // The pixel, of all the batch's, at the left of a row of a window.
  int64_t pixel(const Place& place, int64_t slice, int64_t row) const {
    return (place.image * p_.depth + place.front + slice) * slice_ + (place.top + row) * p_.width;
  }

  // f(first, pixels) for a window's pixels, as far as each is the last one's neighbour in memory: in two parts at most.
  template <class F>
  void each_run(const Place& place, const F& f) const {
    if (place.rows == p_.height) return f(pixel(place, 0, 0), place.images * place.slices * slice_);
    for (int64_t slice = 0; slice < place.slices; ++slice) f(pixel(place, slice, 0), place.rows * p_.width);
  }

  // Whether a window's row, or one beside it, is in the image.
  bool exists(const Place& place, int64_t z, int64_t row) const {
    z += place.front;
    row += place.top;
    return z >= 0 && z < p_.depth && row >= 0 && row < p_.height;
  }

  Window<Word> padded_window(const Place& place, int64_t channels) const {
    return {place.images, place.slices, place.rows,
            p_.width,     reach_z_,     reach_y_,
            depth_of<Word>(channels), stride_of<Word>(channels)};
  }

  template <class Sink>
  void convolve_in_parts(const Window<Word>& window, const Element* u, const void* w, int64_t columns,
                         const Sink& sink, Ahead* ahead = nullptr) const {
    if constexpr (kIsWinograd<Word>)
      if (window.by_winograd()) {
        const int64_t bands = window.bands(), parts = ceil_div(bands * window.tiles_across(), kTiles);
        const int64_t pieces = std::min(bands, parts);
        for (int64_t piece = 0; piece < pieces; ++piece)
          convolve_by_winograd(window, u, w, columns, bands * piece / pieces, bands * (piece + 1) / pieces, sink,
                               ahead);
        return;
      }
    convolve_directly(window, u, w, columns, 0, window.rows(), sink, ahead);
  }

  // Calls make(pixel, target) for a window's pixels and the rows and slices beside it, and sets zeros beyond the image.
  template <class Make>
  Element* fill(const Place& place, const Window<Word>& window, Buffer& memory, const Make& make) const {
    Element* const buffer = memory.get<Element>(window.size());
    const auto clear = [&](Element* at, int64_t pixels) {
      std::memset(static_cast<void*>(at), 0, pixels * window.stride * sizeof(Element));
    };
    const int64_t right = window.padded_width() - 1 - window.width;
    Element* target = buffer;
    for (int64_t image = 0; image < window.images; ++image)
      for (int64_t z = -reach_z_; z < window.padded_depth() - reach_z_; ++z)
        for (int64_t row = -reach_y_; row < window.padded_height() - reach_y_; ++row) {
          if (!exists(place, z, row)) {
            clear(target, window.padded_width());
            target += window.padded_width() * window.stride;
            continue;
          }
          clear(target, 1);
          target += window.stride;
          const int64_t first = pixel(place, image * window.depth + z, row);
          for (int64_t j = 0; j < p_.width; ++j, target += window.stride) make(first + j, target);
          clear(target, right);
          target += right * window.stride;
        }
    return buffer;
  }

  template <class Source>
  const Element* make_u(const Place& place, const Window<Word>& window, const Source* source, int64_t stride, int64_t c,
                        const Normalization& norm) const {
    return fill(place, window, Scratch::of_this_thread().u, [&](int64_t at, Element* target) {
      prefetch(source + (at + 2 * kAhead) * stride, c);
      affine_relu_row(source + at * stride, Affine(norm), c, window.stride, target);
    });
  }

  const Element* make_dy(int64_t i, const Place& place, const Window<Word>& window) const {
    const int64_t made = made_by(i), k = growth_, stride = channels_, padded = window.stride;
    const Store* const x = x_ + made;
    const Gradient* const arriving = arriving_ + made;
    const uint8_t* const mask = p_.layer[i].growth_mask;
    const auto gradient = true_gradient(made);
    return fill(place, window, Scratch::of_this_thread().dy, [=](int64_t at, Element* target) {
      prefetch(x + (at + kAhead) * stride, k);
      prefetch(arriving + (at + kAhead) * stride, k);
      write_row(target, k, padded, mask, at, [=](int64_t v) { return gradient(at, v, k - v); });
    });
  }

  // Dropout of some channels of a pixel.
  void drop(float* values, const uint8_t* mask, int64_t at, int64_t c) const {
    if (mask == nullptr) return;
    for (int64_t v = 0; v < c; ++v) values[v] *= mask[at * c + v] * static_cast<float>(p_.keep_scale);
  }

  // make(channel) of a pixel's c channels after dropout, as a multiply takes them: with zeros up to `padded`.
  template <class Make>
  void write_row(Element* target, int64_t c, int64_t padded, const uint8_t* mask, int64_t at, const Make& make) const {
    int64_t v = 0;
    for (; v < c; v += Isa::kLanes) {
      const int64_t count = std::min<int64_t>(Isa::kLanes, c - v);
      Vector values = Isa::keep(make(v), count);
      if (mask != nullptr) {
        float dropped[Isa::kLanes];
        Isa::store(dropped, values);
        for (int64_t lane = 0; lane < count; ++lane)
          dropped[lane] *= mask[at * c + v + lane] * static_cast<float>(p_.keep_scale);
        values = Isa::load(dropped);
      }
      Isa::store(target + v, values);
    }
    for (; v < padded; v += Isa::kLanes) Isa::store(target + v, Isa::zero());
  }

  const TrainingArgs& p_;
  const Team team_;
  const int64_t slice_, pixels_, channels_, hidden_;
  const int64_t hidden_padded_, hidden_columns_, growth_, growth_columns_;  // columns_, padded_: as a multiply has them
  Store* const x_;
  Gradient* const grad_;
  const Windows windows_;
  const int64_t reach_z_, reach_y_;  // of its 3x3s
  const bool shares_statistics_;
  Normalization norm1_, norm2_;
  Statistics statistics_;
  Sums<double> sums_;
  Sums<float> weight_sums_;
  Buffer packed_, da_memory_;
  int64_t read_ = 0;                   // the first channel that the layer at hand reads
  Element* da_ = nullptr;              // of the bottleneck, rounded where multiplies are
  const Gradient* arriving_ = nullptr;    // what G holds so far: at first, the gradient of X
  std::vector<float> through_;         // P and Q
  std::vector<float> own_through_;  // p and q of the norm at hand
};
