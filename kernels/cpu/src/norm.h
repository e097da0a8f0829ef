// BatchNorm as relu(scale * x + shift), the prologue and epilogue of every convolution here.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

using Vector = Isa::Vector;

// A vector of which `count` values exist in memory, all of them or fewer; the others are zeros, and not written.
template <class Element>
Vector load_up_to(const Element* p, int64_t count) {
  return count >= Isa::kLanes ? Isa::load(p) : Isa::load_part(p, std::max<int64_t>(0, count));
}

template <class Element>
void store_up_to(Element* p, Vector v, int64_t count) {
  if (count >= Isa::kLanes) Isa::store(p, v);
  else Isa::store_part(p, v, count);
}

// scale = weight / sqrt(var + eps) and shift = bias - mean * scale of some channels; zero in the padding, so
// that padded channels stay zero.
template <class Element>
void affine(const Norm& norm, int64_t channels, int64_t padded, float* scale, float* shift) {
  const Vector eps = Isa::broadcast(static_cast<float>(norm.eps));
  for (int64_t c = 0; c < padded; c += Isa::kLanes) {
    const int64_t count = std::clamp<int64_t>(channels - c, 0, Isa::kLanes);
    const auto load = [&](const void* vector) { return load_up_to(static_cast<const Element*>(vector) + c, count); };
    const Vector s = Isa::keep(Isa::div(load(norm.weight), Isa::sqrt(Isa::add(load(norm.var), eps))), count);
    Isa::store(scale + c, s);
    Isa::store(shift + c, Isa::keep(Isa::negated_multiply_add(load(norm.mean), s, load(norm.bias)), count));
  }
}

inline void affine(const Norm& norm, int32_t dtype, int64_t channels, int64_t padded, float* scale, float* shift) {
  with_element_type(dtype, [&](auto* type) {
    affine<std::remove_pointer_t<decltype(type)>>(norm, channels, padded, scale, shift);
  });
}

struct Affine {
  const float* scale;
  const float* shift;

  Affine from(int64_t channel) const { return {scale + channel, shift + channel}; }

  Vector operator()(Vector x, int64_t c) const {  // relu(scale * x + shift) of channels c, c + 1, ...; keeps NaN
    return Isa::relu(Isa::multiply_add(x, Isa::load(scale + c), Isa::load(shift + c)));
  }
};

// One norm and its vectors.
class OwnAffine : public Affine {
 public:
  OwnAffine(const Norm& norm, int32_t dtype, int64_t channels, int64_t padded) {
    float* const vectors = vectors_.get<float>(2 * padded);
    affine(norm, dtype, channels, padded, vectors, vectors + padded);
    scale = vectors;
    shift = vectors + padded;
  }

 private:
  Buffer vectors_;
};

// One norm of float32 vectors, and what its gradient needs besides. Zeros in the padding.
class Normalization : public Affine {
 public:
  const float* mean;
  const float* rstd;

  void set(const Norm& norm, int64_t channels, int64_t padded) {
    float* const vectors = vectors_.get<float>(4 * padded);
    affine<float>(norm, channels, padded, vectors, vectors + padded);
    const Vector eps = Isa::broadcast(static_cast<float>(norm.eps)), one = Isa::broadcast(1);
    for (int64_t c = 0; c < padded; c += Isa::kLanes) {
      const int64_t count = std::clamp<int64_t>(channels - c, 0, Isa::kLanes);
      const auto load = [&](const void* vector) { return load_up_to(static_cast<const float*>(vector) + c, count); };
      Isa::store(vectors + 2 * padded + c, load(norm.mean));
      Isa::store(vectors + 3 * padded + c, Isa::keep(Isa::div(one, Isa::sqrt(Isa::add(load(norm.var), eps))), count));
    }
    scale = vectors;
    shift = vectors + padded;
    mean = vectors + 2 * padded;
    rstd = vectors + 3 * padded;
  }

 private:
  Buffer vectors_;
};

// p + q (x - mean): what flows to a norm's input through its batch's statistics.
struct ThroughStatistics {
  const float* mean;
  const float* p;
  const float* q;

  Vector operator()(Vector x, int64_t c, int64_t exist = Isa::kLanes) const {  // of channels c, c + 1, ...
    const auto of = [&](const float* vector) { return load_up_to(vector + c, exist); };
    return Isa::multiply_add(Isa::sub(x, of(mean)), of(q), of(p));
  }
};

// z = relu(affine(x)) of `channels` channels of one pixel, and zeros up to `padded`.
template <class Store, class Element>
inline void affine_relu_row(const Store* x, const Affine& norm, int64_t channels, int64_t padded, Element* z) {
  int64_t c = 0;
  for (; c + Isa::kLanes <= channels; c += Isa::kLanes) Isa::store(z + c, norm(Isa::load(x + c), c));
  if (c < channels) {
    Isa::store(z + c, norm(Isa::load_part(x + c, channels - c), c));
    c += Isa::kLanes;
  }
  for (; c < padded; c += Isa::kLanes) Isa::store(z + c, Isa::zero());
}

// The same for bfloat16 to bfloat16, two neighbouring channels in one 32-bit lane: of each 2 * kLanes channels, the
// vectors have the even ones first. A third fewer instructions, in what is half as long as the multiply.
struct PairedAffine {
  const float* scale;
  const float* shift;

  PairedAffine from(int64_t channel) const { return {scale + channel, shift + channel}; }

  static void arrange(float* vector, int64_t padded) {
    float even_odd[2 * Isa::kLanes];
    for (float* part = vector; part < vector + padded; part += 2 * Isa::kLanes) {
      for (int i = 0; i < 2 * Isa::kLanes; ++i) even_odd[i / 2 + i % 2 * Isa::kLanes] = part[i];
      std::memcpy(part, even_odd, sizeof(even_odd));
    }
  }

  Vector operator()(Vector x, int64_t at) const { return Affine{scale, shift}(x, at); }
};

template <class I = Isa>
inline void affine_relu_row(const BFloat16* x, const PairedAffine& norm, int64_t channels, int64_t padded,
                            BFloat16* z) {
  constexpr int64_t kPairs = 2 * I::kLanes;
  for (int64_t c = 0; c < padded; c += kPairs) {
    const int64_t left = std::max<int64_t>(0, channels - c);
    const auto pairs = left >= kPairs ? I::load_pairs(x + c) : I::load_pairs_part(x + c, left);
    I::store_pairs(z + c, norm(I::low(pairs), c), norm(I::high(pairs), c + I::kLanes));
  }
}

// Rounds to `Round` and stores `channels` floats as `Store`.
template <class Round, class Store>
inline void store_row(const float* c, int64_t channels, Store* y) {
  const auto rounded = [&](int64_t i) {
    const Vector v = Isa::load(c + i);
    if constexpr (std::is_same_v<Round, Store> || std::is_same_v<Round, float>) return v;
    else return Isa::round(v, static_cast<Round*>(nullptr));
  };
  for (int64_t i = 0; i < channels; i += Isa::kLanes) store_up_to(y + i, rounded(i), channels - i);
}
