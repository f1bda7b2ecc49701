// CholeskyQR2 (Yamamoto et al. 2015) on float64 Gram matrices, with twice-iterated Gram-Schmidt
// where the block is too ill-conditioned for it, and the polar factor by one-sided Jacobi.
#include "orth.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "products.h"
#include "tensors.h"

namespace molegrad::cpu {
namespace {

using Numbers = std::vector<double>;  // row-major

// Above this condition number the Gram matrix has lost too many of float64's digits.
constexpr double kGramLimit = 1e6;
// Up to this one a float64 CholeskyQR is orthonormal to 1e-10, enough for float32 results.
constexpr double kOnePassLimit = 1e3;
constexpr int kMaxSweeps = 40;
// Cosine, in units of the result's rounding, below which two vectors count as orthogonal.
constexpr double kJacobiTolerance = 0.25;

View const_view(const Numbers& x, int64_t rows, int64_t cols) {
  return view_of(x.data(), rows, cols);
}
MutableView mutable_view(Numbers& x, int64_t rows, int64_t cols) {
  return view_of(x.data(), rows, cols);
}

// Any view as float64.
void load(const View& src, double* dst) {
  const KernelSet<double>& set = kernel_set<double>();
  const Panels panels(set.lanes, src.rows, src.cols);
  Buffer<double> packed(panels.size());
  set.pack(src, src.rows, 0, src.rows, packed.data());
  set.reduce(packed.data(), 0, 1, src.rows, false, view_of(dst, src.rows, src.cols), 0, src.rows);
}

template <typename C>
void store(const double* src, const MutableView& dst) {
  for (int64_t r = 0; r < dst.rows; ++r)
    for (int64_t c = 0; c < dst.cols; ++c)
      static_cast<C*>(dst.data)[r * dst.ld + c] = static_cast<C>(src[r * dst.cols + c]);
}

// Column-wise largest magnitudes; false where an entry is NaN or infinite.
bool column_maxima(const Numbers& z, int64_t k, std::vector<double>& maxima) {
  maxima.assign(k, 0.0);
  bool finite = true;
  for (size_t i = 0; i < z.size(); i += k)
    for (int64_t j = 0; j < k; ++j) {
      const double magnitude = std::fabs(z[i + j]);
      finite &= magnitude <= std::numeric_limits<double>::max();
      maxima[j] = std::max(maxima[j], magnitude);
    }
  return finite;
}

// The power of two next above x: dividing by it is exact.
double power_of_two(double x) {
  if (x == 0) return 1;
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::clamp(exponent, -1000, 1000));
}

// Upper R with RᵀR = g, in place over g; false where a pivot is not positive.
bool cholesky(Numbers& g, int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    double* row = g.data() + i * k;
    if (!(row[i] > 0)) return false;
    const double pivot = std::sqrt(row[i]);
    for (int64_t j = i; j < k; ++j) row[j] /= pivot;
    for (int64_t l = i + 1; l < k; ++l)
      for (int64_t j = l; j < k; ++j) g[l * k + j] -= row[l] * row[j];
    for (int64_t j = 0; j < i; ++j) row[j] = 0;
  }
  return true;
}

// Inverse of an upper triangular matrix.
Numbers upper_inverse(const Numbers& r, int64_t k) {
  Numbers inverse(k * k, 0.0);
  for (int64_t i = k - 1; i >= 0; --i) {
    double* row = inverse.data() + i * k;
    row[i] = 1;
    for (int64_t l = i + 1; l < k; ++l)
      for (int64_t j = l; j < k; ++j) row[j] -= r[i * k + l] * inverse[l * k + j];
    for (int64_t j = i; j < k; ++j) row[j] /= r[i * k + i];
  }
  return inverse;
}

Numbers upper_product(const Numbers& a, const Numbers& b, int64_t k) {
  Numbers c(k * k, 0.0);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t l = i; l < k; ++l)
      for (int64_t j = l; j < k; ++j) c[i * k + j] += a[i * k + l] * b[l * k + j];
  return c;
}

// A block Z (m, k) on its way to an orthonormal one.
struct Block {
  Numbers& z;
  int64_t m, k;
  std::vector<double> reference;  // column norms
};

std::vector<double> column_norms(const Numbers& z, int64_t k) {
  std::vector<double> norms(k, 0.0);
  for (size_t i = 0; i < z.size(); i += k)
    for (int64_t j = 0; j < k; ++j) norms[j] += z[i + j] * z[i + j];
  for (double& norm : norms) norm = std::sqrt(norm);
  return norms;
}

// One CholeskyQR: z <- Q, r <- R. Returns the condition estimate ‖R⁻¹‖_F of the column-normalised
// block (as in molegrad/ops/orth.py), or 0 with nothing changed where the block has to go to
// Gram-Schmidt.
double cholesky_qr(const Block& block, double tolerance, Numbers& r) {
  const int64_t k = block.k;
  Numbers gram(k * k);
  const View z = const_view(block.z, block.m, k);
  product_tn<double>(z, z, mutable_view(gram, k, k));
  std::vector<double> norms(k);
  for (int64_t j = 0; j < k; ++j) {
    norms[j] = std::sqrt(gram[j * k + j]);
    if (!(norms[j] > 0) || norms[j] <= tolerance * block.reference[j]) return 0;
  }
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) gram[i * k + j] /= norms[i] * norms[j];
  if (!cholesky(gram, k)) return 0;
  for (int64_t j = 0; j < k; ++j)
    if (gram[j * k + j] <= tolerance) return 0;
  Numbers inverse = upper_inverse(gram, k);
  const double cond = std::sqrt(kernels().dot(inverse.data(), inverse.data(), k * k));
  if (!(cond <= kGramLimit)) return 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = i; j < k; ++j) {
      inverse[i * k + j] /= norms[i];
      gram[i * k + j] *= norms[j];
    }
  product_nn<double>(z, const_view(inverse, k, k), mutable_view(block.z, block.m, k));
  r = gram;
  return cond;
}

// Twice-iterated Gram-Schmidt; dependent columns are completed by the unit vector farthest from
// the span so far. Whether there was one.
bool gram_schmidt(const Block& block, double tolerance, Numbers& r) {
  const KernelTable& table = kernels();
  const int64_t m = block.m, k = block.k;
  Numbers columns(k * m);               // of Z, each contiguous
  std::vector<double> covered(m, 0.0);  // squared row norms of the basis so far
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j) columns[j * m + i] = block.z[i * k + j];
  r.assign(k * k, 0.0);
  // Subtracts from column j what lies in the span so far; its coefficients go to R.
  const auto clean = [&](int64_t j, bool record) {
    double* column = columns.data() + j * m;
    for (int64_t i = 0; i < j; ++i) {
      const double h = table.dot(columns.data() + i * m, column, m);
      if (h != 0) table.axpy(-h, columns.data() + i * m, column, m);
      if (record) r[i * k + j] += h;
    }
    return std::sqrt(table.dot(column, column, m));
  };
  bool deficient = false;
  for (int64_t j = 0; j < k; ++j) {
    double* column = columns.data() + j * m;
    double norm = 0;
    if (block.reference[j] > 0) {
      clean(j, true);
      norm = clean(j, true);
    }
    if (!(norm > tolerance * block.reference[j])) {
      deficient = true;
      std::fill_n(column, m, 0.0);
      column[std::min_element(covered.begin(), covered.end()) - covered.begin()] = 1;
      clean(j, false);
      norm = clean(j, false);
    } else {
      r[j * k + j] = norm;
    }
    for (int64_t i = 0; i < m; ++i) {
      column[i] /= norm;
      covered[i] += column[i] * column[i];
    }
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j) block.z[i * k + j] = columns[j * m + i];
  return deficient;
}

// z <- Q, r <- R for a finite block whose columns cannot overflow a float64 Gram matrix. `eps` is
// the rounding of the dtype that Z came from.
OrthStatus factor(Block block, double cond_max, double eps, Numbers& r) {
  const double tolerance = 8 * eps * std::sqrt(static_cast<double>(block.k));
  const bool is_double = eps < 1e-12;
  const double cond = cholesky_qr(block, tolerance, r);
  if (cond == 0) return gram_schmidt(block, tolerance, r) ? kRankDeficient : kIllConditioned;
  if (is_double || cond > kOnePassLimit) {
    std::fill(block.reference.begin(), block.reference.end(), 1.0);
    Numbers again;
    if (cholesky_qr(block, tolerance, again) != 0) r = upper_product(again, r, block.k);
  }
  return cond <= cond_max ? kSafe : kIllConditioned;
}

void set_identity(Numbers& z, int64_t k) {
  std::fill(z.begin(), z.end(), 0.0);
  for (int64_t j = 0; j < k; ++j) z[j * k + j] = 1;
}

}  // namespace

template <typename C>
OrthStatus orthonormalize(const View& y, double cond_max, const MutableView& q,
                          const MutableView& r) {
  const int64_t m = y.rows, k = y.cols;
  Numbers z(m * k), triangle(k * k, 0.0);
  load(y, z.data());
  std::vector<double> scale;
  OrthStatus status = kNonFinite;
  if (column_maxima(z, k, scale)) {
    for (double& s : scale) s = power_of_two(s);
    for (size_t i = 0; i < z.size(); i += k)
      for (int64_t j = 0; j < k; ++j) z[i + j] /= scale[j];
    const Block block{z, m, k, column_norms(z, k)};
    status = factor(block, cond_max, std::numeric_limits<C>::epsilon(), triangle);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = i; j < k; ++j) triangle[i * k + j] *= scale[j];
  } else {
    set_identity(z, k);
    std::fill(triangle.begin(), triangle.end(), std::nan(""));
  }
  store<C>(z.data(), q);
  store<C>(triangle.data(), r);
  return status;
}

template OrthStatus orthonormalize<float>(const View&, double, const MutableView&,
                                          const MutableView&);
template OrthStatus orthonormalize<double>(const View&, double, const MutableView&,
                                           const MutableView&);

namespace {

// P = W (WᵀW)^(-1/2) (n, k); modes below the rounding of W are zero. NaN throughout for a W with
// NaN or Inf.
template <typename C>
void polar_factor(const View& w, const MutableView& p) {
  const int64_t n = w.rows, k = w.cols;
  Numbers z(n * k), r;
  load(w, z.data());
  std::vector<double> maxima;
  if (!column_maxima(z, k, maxima)) {
    for (int64_t i = 0; i < n; ++i)
      std::fill_n(static_cast<C*>(p.data) + i * p.ld, k, std::numeric_limits<C>::quiet_NaN());
    return;
  }
  const double scale = power_of_two(*std::max_element(maxima.begin(), maxima.end()));
  for (double& value : z) value /= scale;
  const double eps = std::numeric_limits<C>::epsilon();
  factor({z, n, k, column_norms(z, k)}, kGramLimit, eps, r);

  // One-sided Jacobi on Rᵀ, whose columns are the rows of R: X = Rᵀ J has orthogonal columns of
  // length sigma, so R = J X ᵀ and polar(R) = sum over modes of J_i X_iᵀ / sigma_i.
  Numbers rotations(k * k, 0.0);
  set_identity(rotations, k);
  const KernelTable& table = kernels();
  // Below the rounding of a float64 inner product nothing can be told apart.
  const double orthogonal =
      std::max(kJacobiTolerance * eps, 4e-16 * std::sqrt(static_cast<double>(k)));
  std::vector<double> squares(k), sigma(k);
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    for (int64_t i = 0; i < k; ++i) squares[i] = table.dot(r.data() + i * k, r.data() + i * k, k);
    bool rotated = false;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = i + 1; j < k; ++j)
        rotated |=
            table.jacobi_rotate(r.data() + i * k, r.data() + j * k, rotations.data() + i * k,
                                rotations.data() + j * k, k, orthogonal, &squares[i], &squares[j]);
    if (!rotated) break;
  }
  for (int64_t i = 0; i < k; ++i)
    sigma[i] = std::sqrt(table.dot(r.data() + i * k, r.data() + i * k, k));
  const double largest = *std::max_element(sigma.begin(), sigma.end());
  const double tolerance = 8 * std::sqrt(static_cast<double>(k)) * eps * largest;
  Numbers polar(k * k, 0.0);
  for (int64_t i = 0; i < k; ++i) {
    if (!(sigma[i] > tolerance)) continue;
    for (int64_t l = 0; l < k; ++l)
      table.axpy(rotations[i * k + l] / sigma[i], r.data() + i * k, polar.data() + l * k, k);
  }
  Numbers result(n * k);
  product_nn<double>(const_view(z, n, k), const_view(polar, k, k), mutable_view(result, n, k));
  store<C>(result.data(), p);
}

// The i-th of the (rows, cols) matrices that follow each other in a contiguous tensor.
template <typename C>
MutableView slice(const Tensor& x, int64_t i, int64_t rows, int64_t cols) {
  return view_of(memory_of<C>(x) + i * rows * cols, rows, cols);
}

// one(i) for every matrix of a batch. A batch that occupies all threads is spread over them; a
// smaller one leaves them to the products inside.
template <typename F>
void for_each_matrix(int64_t count, const F& one) {
  if (count < static_cast<int64_t>(torch::stable::get_num_threads())) {
    for (int64_t i = 0; i < count; ++i) one(i);
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(i);
  });
}

std::tuple<Tensor, Tensor, Tensor> orthonormalize_op(Tensor y, double cond_max) {
  check_block("orthonormalize", y);
  const Matrix y_in(y);
  const int64_t m = y.size(y.dim() - 2), k = y.size(y.dim() - 1), count = y_in.rows / m;
  Tensor q = new_tensor(y, other_last_sizes(y, 0, {}), acc_dtype(y));
  Tensor r = new_tensor(y, other_last_sizes(y, 2, {k, k}), acc_dtype(y));
  Tensor status = new_tensor(y, other_last_sizes(y, 2, {}), ScalarType::Int);
  with_compute_type(acc_dtype(y), [&](auto zero) {
    using C = decltype(zero);
    auto* statuses = memory_of<int32_t>(status);
    for_each_matrix(count, [&](int64_t i) {
      statuses[i] = orthonormalize<C>(part_of(view_of(y_in), i * m, m, 0, k), cond_max,
                                      slice<C>(q, i, m, k), slice<C>(r, i, k, k));
    });
  });
  return {q, r, status};
}

Tensor polar_factor_op(Tensor w) {
  check_block("polar_factor", w);
  const Matrix w_in(w);
  const int64_t n = w.size(w.dim() - 2), k = w.size(w.dim() - 1), count = w_in.rows / n;
  Tensor p = new_tensor(w, other_last_sizes(w, 0, {}), acc_dtype(w));
  with_compute_type(acc_dtype(w), [&](auto zero) {
    using C = decltype(zero);
    for_each_matrix(count, [&](int64_t i) {
      polar_factor<C>(part_of(view_of(w_in), i * n, n, 0, k), slice<C>(p, i, n, k));
    });
  });
  return p;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CPU, m) {
  m.impl("orthonormalize", TORCH_BOX(&orthonormalize_op));
  m.impl("polar_factor", TORCH_BOX(&polar_factor_op));
}

}  // namespace molegrad::cpu
