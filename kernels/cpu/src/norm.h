// BatchNorm as relu(scale * x + shift), the prologue and epilogue of every convolution here.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

using Vector = Isa::Vector;

// scale = weight / sqrt(var + eps) and shift = bias - mean * scale of some channels; zero in the padding, so
// that padded channels stay zero.
template <class Element>
void affine(const Norm& norm, int64_t channels, int64_t padded, float* scale, float* shift) {
  const auto *weight = static_cast<const Element*>(norm.weight), *bias = static_cast<const Element*>(norm.bias);
  const auto *mean = static_cast<const Element*>(norm.mean), *var = static_cast<const Element*>(norm.var);
  const Vector eps = Isa::broadcast(static_cast<float>(norm.eps));
  for (int64_t c = 0; c < padded; c += Isa::kLanes) {
    const int64_t left = std::max<int64_t>(0, channels - c);
    const auto load = [&](const Element* vector) {
      return left >= Isa::kLanes ? Isa::load(vector + c) : Isa::load_part(vector + c, left);
    };
    const Vector s = left ? Isa::div(load(weight), Isa::sqrt(Isa::add(load(var), eps))) : Isa::zero();
    const Vector real = left >= Isa::kLanes ? s : Isa::keep(s, left);
    Isa::store(scale + c, real);
    const Vector t = left ? Isa::negated_multiply_add(load(mean), real, load(bias)) : Isa::zero();
    Isa::store(shift + c, left >= Isa::kLanes ? t : Isa::keep(t, left));
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

  Vector operator()(Vector x, int64_t c) const {  // relu(scale * x + shift) of channels c, c + 1, ...; keeps NaN
    return Isa::relu(Isa::multiply_add(x, Isa::load(scale + c), Isa::load(shift + c)));
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
  int64_t i = 0;
  for (; i + Isa::kLanes <= channels; i += Isa::kLanes) Isa::store(y + i, rounded(i));
  if (i < channels) Isa::store_part(y + i, rounded(i), channels - i);
}
