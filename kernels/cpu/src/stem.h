// A stem at given statistics: out = maxpool3x3/2(relu(affine(conv(x)))), of images or sequences.
//
// The convolution is one multiply: a row of its left side are all the values of x that a pixel is made of, tap by tap.
// What it makes stays in cache: of each row of pixels the pool keeps the maxima along it, and every second row it has
// three of these to make a row of the output.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

template <class Round, class Word>
class Stem {
  using Element = typename Word::Element;
  static constexpr int64_t kSlack = Isa::kLanes * Word::kElements;  // elements of a vector
  static constexpr int64_t kStrip = Isa::kStrip / 2;                // pixels that a multiply makes

 public:
  Stem(const StemArgs& args, ParallelFor parallel_for)
      : p_(args),
        team_{parallel_for, args.threads},
        height_((p_.height + 2 * p_.padding_h - p_.kernel_h) / p_.stride_h + 1),
        width_((p_.width + 2 * p_.padding_w - p_.kernel_w) / p_.stride_w + 1),
        row_(p_.kernel_w * p_.channels),
        k_(p_.kernel_h * row_),
        stride_(round_up(k_ + kSlack, kSlack)),
        columns_(round_up(p_.out_channels, Isa::kLanes)),
        norm_(p_.norm, p_.norm_dtype, p_.out_channels, columns_) {}

  void run() {
    const int64_t rows = (height_ + 1) / 2;
    team_.run(p_.images * rows, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      for (int64_t first = begin, last; first < end; first = last) {
        const int64_t image = first / rows;
        last = std::min(end, (image + 1) * rows);
        run_rows(image, first - image * rows, last - image * rows);
      }
    });
  }

 private:
  // Rows [first, last) of an image's output.
  void run_rows(int64_t image, int64_t first, int64_t last) {
    const int64_t pooled_width = (width_ + 1) / 2, wide = pooled_width * columns_;
    float* const maxima = Scratch::of_this_thread().row.template get<float>(3 * wide);
    int64_t y = MaxPoolRange(first, height_).first;
    Source source(p_, image, y * p_.stride_h - p_.padding_h);
    auto* out = static_cast<Round*>(p_.out) + (image * ((height_ + 1) / 2) + first) * pooled_width * p_.out_channels;
    for (int64_t row = first; row < last; ++row) {
      const MaxPoolRange range(row, height_);
      for (; y < range.last; ++y) convolve(source, y, maxima + y % 3 * wide);
      for (int64_t j = 0; j < pooled_width; ++j, out += p_.out_channels)
        for (int64_t c = 0; c < p_.out_channels; c += Isa::kLanes) {
          Vector best = Isa::zero();  // of values that a ReLU made
          for (int64_t i = range.first; i < range.last; ++i)
            best = Isa::max_keeping_nan(best, Isa::load(maxima + i % 3 * wide + j * columns_ + c));
          store_up_to(out + c, best, p_.out_channels - c);
        }
    }
  }

  // The rows of x that a row of pixels is made of, with their padding.
  class Source {
   public:
    Source(const StemArgs& p, int64_t image, int64_t first)
        : p_(p), image_(image), stride_((p.width + 2 * p.padding_w) * p.channels + kSlack), next_(first) {
      rows_ = Scratch::of_this_thread().u.template get<Element>(p.kernel_h * stride_);
      std::memset(static_cast<void*>(rows_), 0, p.kernel_h * stride_ * sizeof(Element));
    }

    // Row y, from the padding on; of those asked for before, the last few are still here.
    const Element* row(int64_t y) {
      for (; next_ <= y; ++next_) load(next_);
      return at(y);
    }

   private:
    Element* at(int64_t y) const { return rows_ + (y + p_.padding_h) % p_.kernel_h * stride_; }

    void load(int64_t y) const {
      Element* const target = at(y) + p_.padding_w * p_.channels;
      if (y < 0 || y >= p_.height) {
        std::memset(static_cast<void*>(target), 0, p_.width * p_.channels * sizeof(Element));
        return;
      }
      with_element_type(p_.store, [&](auto* type) {
        using Store = std::remove_pointer_t<decltype(type)>;
        const int64_t size = p_.height * p_.width;  // of a channel
        const auto* const x = static_cast<const Store*>(p_.x) + image_ * size * p_.channels;
        if (!p_.planar) return copy(x + y * p_.width * p_.channels, p_.width * p_.channels, target);
        for (int64_t c = 0; c < p_.channels; ++c)
          for (int64_t i = 0; i < p_.width; ++i)
            convert(x[c * size + y * p_.width + i], target[i * p_.channels + c]);
      });
    }

    template <class Store>
    static void copy(const Store* from, int64_t count, Element* to) {
      for (int64_t i = 0; i < count; i += Isa::kLanes) store_up_to(to + i, load_up_to(from + i, count - i), count - i);
    }

    const StemArgs& p_;
    const int64_t image_, stride_;
    int64_t next_;  // row to load
    Element* rows_;
  };

  // Of row y of relu(affine(conv(x))) the maxima along it.
  void convolve(Source& source, int64_t y, float* maxima) const {
    constexpr int64_t e = Word::kElements;
    const int64_t depth = depth_of<Word>(k_);
    Scratch& scratch = Scratch::of_this_thread();
    Element* const z = scratch.z.template get<Element>(round_up(kStrip, Isa::kRowBlock) * stride_);
    float* const h = scratch.product.template get<float>(round_up(kStrip, Isa::kRowBlock) * columns_);
    std::memset(maxima, 0, (width_ + 1) / 2 * columns_ * sizeof(float));
    const int64_t step = p_.stride_w * p_.channels;
    for (int64_t first = 0; first < width_; first += kStrip) {
      const int64_t count = std::min<int64_t>(kStrip, width_ - first);
      for (int64_t tap = 0; tap < p_.kernel_h; ++tap) {  // each goes over the beginning of the next
        const Element* const from = source.row(y * p_.stride_h - p_.padding_h + tap) + first * step;
        for (int64_t i = 0; i < count; ++i) copy_over(from + i * step, row_, z + i * stride_ + tap * row_);
      }
      for (int64_t i = 0; i < count; ++i) store_words(z + i * stride_ + k_, Isa::zero());
      gemm<Word>({reinterpret_cast<const Word*>(z), stride_ / e, count},
                 {static_cast<const Word*>(p_.conv), padded<Word>(k_) / e, columns_, 0, depth / e}, h, false);
      pool_along(h, first, count, maxima);
    }
  }

  // Whole vectors, of which the last may go over the end.
  static void copy_over(const Element* from, int64_t count, Element* to) {
    for (int64_t i = 0; i < count; i += kSlack) store_words(to + i, Isa::load(reinterpret_cast<const float*>(from + i)));
  }

  static void store_words(Element* to, Vector words) { Isa::store(reinterpret_cast<float*>(to), words); }

  // The maxima of relu(affine(h)) of pixels [first, first + count) of a row, and those of before.
  void pool_along(const float* h, int64_t first, int64_t count, float* maxima) const {
    for (int64_t j = first / 2; 2 * j - 1 < first + count && j < (width_ + 1) / 2; ++j) {
      const int64_t begin = std::max<int64_t>(0, 2 * j - 1 - first), end = std::min(count, 2 * j + 2 - first);
      for (int64_t c = 0; c < columns_; c += Isa::kLanes) {
        Vector best = Isa::load(maxima + j * columns_ + c);
        for (int64_t i = begin; i < end; ++i)
          best = Isa::max_keeping_nan(best, norm_(Isa::load(h + i * columns_ + c), c));
        Isa::store(maxima + j * columns_ + c, best);
      }
    }
  }

  const StemArgs& p_;
  const Team team_;
  const int64_t height_, width_;  // of what the convolution makes
  const int64_t row_, k_;            // values of x that a pixel is made of, in one row and in all
  const int64_t stride_;             // of pixels in the multiply's left side
  const int64_t columns_;
  const OwnAffine norm_;
};
