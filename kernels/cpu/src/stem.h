// A stem at given statistics: out = maxpool3x3/2(relu(affine(conv(x)))), of volumes 3x3x3.
//
// The convolution is one multiply: a row of its left side are all the values of x that a pixel is made of, tap by tap.
// What it makes stays in cache: of each row of pixels the pool keeps the maxima along it, and every second row it has
// three of these to make a row of the output. Of a volume that is a row for each of one or two of the output's slices,
// and they keep the maxima of those that slices before made for them.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

template <class Round, class Word>
class Stem {
  using Element = typename Word::Element;
  static constexpr int64_t e = Word::kElements;
  static constexpr int64_t kSlack = Isa::kLanes * e;  // elements of a vector
  static constexpr bool kGathers = Isa::template kDepth<Word> > e;
  static constexpr int64_t kStrip = kGathers ? Isa::kStrip / 2 : 2 * Isa::kStrip;  // pixels that a multiply makes

 public:
  Stem(const StemArgs& args, ParallelFor parallel_for)
      : p_(args),
        team_{parallel_for, args.threads},
        depth_((p_.depth + 2 * p_.padding_d - p_.kernel_d) / p_.stride_d + 1),
        height_((p_.height + 2 * p_.padding_h - p_.kernel_h) / p_.stride_h + 1),
        width_((p_.width + 2 * p_.padding_w - p_.kernel_w) / p_.stride_w + 1),
        row_(p_.kernel_w * p_.channels),
        part_(round_up(row_, p_.compute == kBFloat16 ? 2 : 1)),
        k_(p_.kernel_d * p_.kernel_h * part_),
        parted_(part_ > row_ || p_.stride_w * p_.channels % e > 0),
        step_(parted_ ? part_ : p_.stride_w * p_.channels),
        stride_(round_up(std::max(width_ * step_, (p_.width + 2 * p_.padding_w) * p_.channels), kSlack) + kSlack),
        columns_(round_up(p_.out_channels, Isa::kLanes)),
        norm_(p_.norm, p_.norm_dtype, p_.out_channels, columns_) {
    for (int64_t i = 0; i < p_.kernel_d; ++i) starts_.push_back(2 * i * p_.kernel_h * stride_ / e);
  }

  void run() {
    const int64_t slices = pooled(depth_), rows = pooled(height_), units = slices > 1 ? slices : rows;
    team_.run(p_.images * units, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      for (int64_t first = begin, last; first < end; first = last) {
        const int64_t image = first / units;
        last = std::min(end, (image + 1) * units);
        const Range part{first - image * units, last - image * units};
        if (slices > 1) run_part(image, part, {0, rows});
        else run_part(image, {0, 1}, part);
      }
    });
  }

 private:
  struct Range {
    int64_t first, last;
  };

  static int64_t pooled(int64_t size) { return (size + 1) / 2; }

  // Some slices of an image's output, and some rows of them.
  void run_part(int64_t image, const Range& slices, const Range& rows) {
    const int64_t wide = pooled(width_) * columns_;
    float* const maxima = Scratch::of_this_thread().row.template get<float>(3 * wide);
    const int64_t front = MaxPoolRange(slices.first, depth_).first, back = MaxPoolRange(slices.last - 1, depth_).last;
    for (int64_t z = front; z < back; ++z) {
      const Range into{std::max(z / 2, slices.first), std::min((z + 1) / 2 + 1, slices.last)};
      int64_t y = MaxPoolRange(rows.first, height_).first;
      Source source(*this, image, z * p_.stride_d - p_.padding_d, y * p_.stride_h - p_.padding_h);
      for (int64_t row = rows.first; row < rows.last; ++row) {
        const MaxPoolRange range(row, height_);
        for (; y < range.last; ++y) convolve(source, y, maxima + y % 3 * wide);
        for (int64_t slice = into.first; slice < into.last; ++slice) {
          const int64_t place = (image * pooled(depth_) + slice) * pooled(height_) + row;
          pool_across(maxima, range, z > MaxPoolRange(slice, depth_).first,
                      static_cast<Round*>(p_.out) + place * pooled(width_) * p_.out_channels);
        }
      }
    }
  }

  // A row of the output: of the maxima of some rows and, where `adds`, of what it is.
  void pool_across(const float* maxima, const MaxPoolRange& range, bool adds, Round* out) const {
    const int64_t width = pooled(width_), channels = p_.out_channels, columns = columns_;
    const int64_t count = range.last - range.first;
    const float* rows[3];
    for (int64_t i = 0; i < count; ++i) rows[i] = maxima + (range.first + i) % 3 * width * columns;
    for (int64_t j = 0; j < width; ++j, out += channels)
      for (int64_t c = 0; c < channels; c += Isa::kLanes) {
        Vector best = adds ? load_up_to(out + c, channels - c) : Isa::zero();  // of values that a ReLU made
        for (int64_t i = 0; i < count; ++i) best = Isa::max_keeping_nan(best, Isa::load(rows[i] + j * columns + c));
        store_up_to(out + c, best, channels - c);
      }
  }

  // The rows of x that a row of pixels is made of, with their padding: of some slices from `front` on, outside x too.
  // Each is there twice, so that the rows below any are those after it.
  class Source {
   public:
    Source(const Stem& stem, int64_t image, int64_t front, int64_t first)
        : s_(stem), p_(stem.p_), image_(image), front_(front), stride_(stem.stride_), next_(first) {
      Scratch& scratch = Scratch::of_this_thread();
      rows_ = scratch.u.template get<Element>(2 * p_.kernel_d * p_.kernel_h * stride_);
      row_ = scratch.dy.template get<Element>(stride_);
      std::memset(static_cast<void*>(row_), 0, stride_ * sizeof(Element));
    }

    // What a row of pixels is made of, from row y on: of the first pixel, and where the others' parts are.
    Rows<Word> pixels(int64_t y) {
      for (; next_ < y + p_.kernel_h; ++next_)
        for (int64_t i = 0; i < p_.kernel_d; ++i) load(i, next_);
      return {reinterpret_cast<const Word*>(at(0, y)), s_.step_ / e, s_.width_,
              {p_.kernel_h, stride_ / e, p_.kernel_d, s_.starts_.data()}};
    }

   private:
    Element* at(int64_t slice, int64_t y) const {
      return rows_ + (2 * slice * p_.kernel_h + (y + p_.padding_h) % p_.kernel_h) * stride_;
    }

    void load(int64_t slice, int64_t y) const {
      Element* const target = at(slice, y);
      const int64_t z = front_ + slice, size = stride_ * sizeof(Element);
      if (z < 0 || z >= p_.depth || y < 0 || y >= p_.height) {
        std::memset(static_cast<void*>(target), 0, size);
      } else {
        read(z, y);
        if (s_.parted_) part(target);
        else std::memcpy(static_cast<void*>(target), row_, size);
      }
      std::memcpy(static_cast<void*>(target + p_.kernel_h * stride_), target, size);
    }

    // A row of x.
    void read(int64_t z, int64_t y) const {
      Element* const target = row_ + p_.padding_w * p_.channels;
      with_element_type(p_.store, [&](auto* type) {
        using Store = std::remove_pointer_t<decltype(type)>;
        const int64_t size = p_.depth * p_.height * p_.width;  // of a channel
        const int64_t first = (z * p_.height + y) * p_.width;
        const auto* const x = static_cast<const Store*>(p_.x) + image_ * size * p_.channels;
        if (!p_.planar) return copy(x + first * p_.channels, p_.width * p_.channels, target);
        for (int64_t c = 0; c < p_.channels; ++c)
          for (int64_t i = 0; i < p_.width; ++i) convert(x[c * size + first + i], target[i * p_.channels + c]);
      });
    }

    template <class Store>
    static void copy(const Store* from, int64_t count, Element* to) {
      for (int64_t i = 0; i < count; i += Isa::kLanes) store_up_to(to + i, load_up_to(from + i, count - i), count - i);
    }

    // What each pixel is made of, by itself, as whole words.
    void part(Element* target) const {
      const int64_t step = p_.stride_w * p_.channels, row = s_.row_, size = s_.part_, end = s_.width_;
      const Element* from = row_;
      for (int64_t i = 0; i < end; ++i, from += step, target += size) {
        copy_over(from, row, target);
        if (size > row) target[row] = Element{};
      }
    }

    const Stem& s_;
    const StemArgs& p_;
    const int64_t image_, front_, stride_;
    int64_t next_;   // row to load
    Element* rows_;  // slice by slice, each of them twice
    Element* row_;   // one, as it is in x
  };

  // Of row y of relu(affine(conv(x))) the maxima along it.
  void convolve(Source& source, int64_t y, float* maxima) const {
    float* const h = Scratch::of_this_thread().product.template get<float>(round_up(kStrip, Isa::kRowBlock) * columns_);
    const Rows<Word> pixels = source.pixels(y * p_.stride_h - p_.padding_h);
    for (int64_t first = 0; first < width_; first += kStrip) {
      const int64_t count = std::min(kStrip, width_ - first);
      const Rows<Word> some{pixels.data + first * pixels.stride, pixels.stride, count, pixels.taps};
      const auto* const w = static_cast<const Word*>(p_.conv);
      const int64_t depth = padded<Word>(k_) / e;
      if constexpr (kGathers) gemm<Word>(gathered(some), {w, depth, columns_, 0, depth_of<Word>(k_) / e}, h, false);
      else gemm<Word>(some, {w, depth, columns_, 0, part_ / e}, h, false);
      pool_along(h, first, count, maxima);
    }
  }

  // The same pixels, each in one piece, for a multiply of whole tiles.
  Rows<Word> gathered(const Rows<Word>& pixels) const {
    const int64_t stride = round_up(k_ + kSlack, kSlack);
    auto* const z = Scratch::of_this_thread().z.template get<Element>(round_up(kStrip, Isa::kRowBlock) * stride);
    for (int64_t i = 0; i < pixels.count; ++i) {
      Element* to = z + i * stride;
      for (int64_t run = 0; run < pixels.taps.runs; ++run)
        for (int64_t tap = 0; tap < pixels.taps.count; ++tap, to += part_) {  // going over the beginning of the next
          const Word* const from = pixels.data + i * pixels.stride + pixels.taps.starts[run] + tap * pixels.taps.step;
          copy_over(reinterpret_cast<const Element*>(from), part_, to);
        }
      store_words(to, Isa::zero());
    }
    return {reinterpret_cast<const Word*>(z), stride / e, pixels.count};
  }

  // Whole vectors, of which the last may go over the end.
  static void copy_over(const Element* from, int64_t count, Element* to) {
    for (int64_t i = 0; i < count; i += kSlack)
      store_words(to + i, Isa::load(reinterpret_cast<const float*>(from + i)));
  }

  static void store_words(Element* to, Vector words) { Isa::store(reinterpret_cast<float*>(to), words); }

  // The maxima of relu(affine(h)) of pixels [first, first + count) of a row, of which those before are there.
  void pool_along(const float* h, int64_t first, int64_t count, float* maxima) const {
    static_assert(kStrip % 2 == 0);  // so a window's first pixel alone may be one of those before
    const int64_t columns = columns_;
    for (int64_t c = 0; c < columns; c += Isa::kLanes) {
      const Vector scale = Isa::load(norm_.scale + c), shift = Isa::load(norm_.shift + c);
      const auto at = [=](int64_t i) {
        return Isa::relu(Isa::multiply_add(Isa::load(h + i * columns + c), scale, shift));
      };
      float* target = maxima + first / 2 * columns + c;
      Vector best = first > 0 ? Isa::load(target) : Isa::zero();
      for (int64_t i = 0; i < count; i += 2, target += columns) {
        const Vector last = i + 1 < count ? at(i + 1) : Isa::zero();
        Isa::store(target, Isa::max_keeping_nan(Isa::max_keeping_nan(best, at(i)), last));
        best = last;
      }
      if (first + count < width_) Isa::store(target, best);
    }
  }

  const StemArgs& p_;
  const Team team_;
  const int64_t depth_, height_, width_;  // of what the convolution makes
  const int64_t row_, part_;              // values of x that a pixel is made of, in one row, and as whole words
  const int64_t k_;                       // in all
  const bool parted_;                     // whether each pixel's are by themselves, or overlap as in x
  const int64_t step_, stride_;           // between pixels, and between rows, of a Source
  std::vector<int64_t> starts_;           // of its slices, in words
  const int64_t columns_;
  const OwnAffine norm_;
};
