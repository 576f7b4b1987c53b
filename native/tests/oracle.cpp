#include "oracle.h"

#include "numbers.h"

namespace qkv {

namespace {

constexpr double U = 0x1p-24;       // roundoff of fp32
constexpr double LEAST = 0x1p-126;  // weights below may be 0

using Row = std::vector<double>;

// All rows of a tensor, in the order (batch, head, row), each times its scale if it has one.
std::vector<Row> read(const Problem& p, Dtype dtype, const View& view, int64_t heads, int64_t rows, int64_t width,
                      const Scales& scales = {}) {
    const int64_t item = format_of(dtype).item;
    std::vector<Row> all;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t at = b * view.batch + h * view.head + i * view.row;
                const double scale = scales.data ? scales.data[b * scales.batch + h * scales.head + i] : 1;
                all.emplace_back(width);
                for (int64_t d = 0; d < width; ++d)
                    all.back()[d] = decode(dtype, (const char*)view.data + (at + d) * item) * scale;
            }
    return all;
}

double read(const Matrix& m, int64_t batch, int64_t head, int64_t row, int64_t column) {
    const int64_t at = batch * m.batch + head * m.head + row * m.row + column * m.column;
    return decode(m.dtype, (const char*)m.data + at * format_of(m.dtype).item);
}

// A sum of products, and the sum of their magnitudes.
struct Dot {
    double sum = 0, size = 0;

    // In four sums, so that no addition waits for the one before it.
    Dot(const Row& a, const Row& b) {
        double sums[4] = {}, sizes[4] = {};
        const auto count = [&](size_t d) {
            const double x = a[d] * b[d];
            sums[d % 4] += x;
            sizes[d % 4] += std::fabs(x);
        };
        size_t d = 0;
        for (; d + 4 <= a.size(); d += 4)
            for (size_t n = 0; n < 4; ++n) count(d + n);
        for (; d < a.size(); ++d) count(d);
        for (size_t n = 0; n < 4; ++n) {
            sum += sums[n];
            size += sizes[n];
        }
    }

    void add(double x) {
        sum += x;
        size += std::fabs(x);
    }
};

double largest_of(const Row& x) {
    double most = 0;
    for (double one : x) most = std::max(most, std::fabs(one));
    return most;
}

double sum_of(const Row& x) {
    double sum = 0;
    for (double one : x) sum += std::fabs(one);
    return sum;
}

// A score with its error, and what its derivative by the product of query and key is before the scale.
struct Score {
    double value, error, slope = 1, slope_error = 0;
};

// `rounding` is what the roundings of query and key add to the error of their product.
Score score(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j, const Dot& dot, double rounding) {
    if (!std::isfinite(dot.sum)) return {NAN, 0};
    Score s{dot.sum * p.scale, ((p.width + 4) * U * dot.size + rounding) * std::fabs(p.scale)};
    if (p.softcap != 0) {
        const double y = std::tanh(s.value / p.softcap), y_error = s.error / p.softcap + 8 * U;
        s = {p.softcap * y, p.softcap * (y_error + 2 * U), 1 - y * y, 2 * y_error + 4 * U};
    }
    if (p.bias.data) {
        const double bias = read(p.bias, b, h, i, j);
        s.error += 2 * U * (std::fabs(s.value) + std::fabs(bias));
        s.value += bias;
    }
    if (p.alibi) {
        const double slant = (double)p.alibi[h] * std::llabs(i + offset_of(p, b) - j);
        s.error += 2 * U * (std::fabs(s.value) + 2 * std::fabs(slant));
        s.value -= slant;
    }
    return s;
}

// Adds factor * x, where the factor may be off by `error` and the sum takes `steps` roundings.
void add(Allowed& to, int64_t at, const Row& x, double factor, double error, double steps) {
    for (size_t d = 0; d < x.size(); ++d) {
        to.value[at + d] += factor * x[d];
        to.error[at + d] += std::fabs(x[d]) * (error + steps * U * std::fabs(factor));
    }
}

// Multiplies by the scale and rounds to the dtype.
void round(Allowed& all, Dtype dtype, double scale) {
    const Format& format = format_of(dtype);
    for (size_t i = 0; i < all.value.size(); ++i) {
        all.value[i] *= scale;
        all.error[i] *= std::fabs(scale);
        all.error[i] += (format.roundoff + 2 * U) * (std::fabs(all.value[i]) + all.error[i]) + format.subnormal;
    }
}

}  // namespace

namespace {

// The number of chunks between a position and the first chunk.
int64_t chunk_of(const Problem& p, int64_t position) {
    return (int64_t)std::floor((double)(position - p.chunk_start) / (double)p.chunk);
}

// Whether positions alone show the key, global tokens apart.
bool is_near(const Problem& p, int64_t batch, int64_t position, int64_t key) {
    const int64_t prefix = p.prefix_lengths ? p.prefix_lengths[batch * p.prefix_lengths_batch] : p.prefix_tokens;
    if (key > position + p.right && key >= prefix) return false;
    if (p.chunk && chunk_of(p, position) != chunk_of(p, key)) return false;
    if (key < p.sink_tokens) return true;
    return key >= position - p.left && (p.dilation <= 1 || std::llabs(position - key) % p.dilation == 0);
}

}  // namespace

bool is_visible(const Problem& p, int64_t batch, int64_t head, int64_t query, int64_t key) {
    const int64_t position = query + offset_of(p, batch);
    const uint8_t* const is_global = p.is_global ? p.is_global + batch * p.is_global_batch : nullptr;
    const bool seen_globally = is_global && (is_global[position] || is_global[key]);
    if (!seen_globally && !is_near(p, batch, position, key)) return false;
    if (p.keep && !p.keep[batch * p.keep_batch + key]) return false;
    if (p.lengths && key >= p.lengths[batch * p.lengths_batch]) return false;
    if (p.document_ids) {
        const int64_t* const documents = p.document_ids + batch * p.document_ids_batch;
        if (documents[position] != documents[key]) return false;
    }
    return !p.allow.data || read(p.allow, batch, head, query, key) != 0;
}

Expected expect(const Problem& p, const Gradients* g, const std::vector<bool>& kept, const Roundoff& roundoff) {
    Expected want;
    const int64_t group = p.heads / p.kv_heads, queries = p.batch * p.heads * p.lq, keys = p.batch * p.kv_heads * p.lk;
    want.out = Allowed(queries * p.value_width);
    want.lse = Allowed(queries);
    if (g) {
        want.dq = Allowed(queries * p.width);
        want.dk = Allowed(keys * p.width);
        want.dv = Allowed(keys * p.value_width);
        want.d_bias = Allowed(queries * p.lk);
        want.d_alibi = Allowed(p.heads);
    }
    const Format& format = format_of(p.dtype);
    const std::vector<Row> q = read(p, p.dtype, p.q, p.heads, p.lq, p.width);
    const std::vector<Row> k = read(p, p.kv_dtype, p.k, p.kv_heads, p.lk, p.width, p.k_scale);
    const std::vector<Row> v = read(p, p.kv_dtype, p.v, p.kv_heads, p.lk, p.value_width, p.v_scale);
    const std::vector<Row> d_outs = g ? read(p, p.dtype, g->d_out, p.heads, p.lq, p.value_width) : std::vector<Row>();
    for (int64_t row = 0; row < queries; ++row) {
        const int64_t b = row / (p.heads * p.lq), h = row / p.lq % p.heads, i = row % p.lq;
        const int64_t first_key = (b * p.kv_heads + h / group) * p.lk;
        std::vector<int64_t> seen;
        std::vector<Score> scores;
        double row_max = p.sink_logits ? p.sink_logits[h] : -INFINITY, largest = 0, error = 0;
        if (p.sink_logits && std::isfinite(row_max)) largest = std::fabs(row_max);
        for (int64_t j = 0; j < p.lk; ++j) {
            if (!is_visible(p, b, h, i, j)) continue;
            seen.push_back(j);
            const Row& key = k[first_key + j];
            const Dot dot(q[row], key);
            double rounding = roundoff.keys * dot.size;
            if (roundoff.fixed_point > 0) rounding += roundoff.of_fixed_point(largest_of(q[row])) * sum_of(key);
            scores.push_back(score(p, b, h, i, j, dot, rounding));
            row_max = std::max(row_max, scores.back().value);
            if (!std::isfinite(scores.back().value)) continue;
            largest = std::max(largest, std::fabs(scores.back().value));
            error = std::max(error, scores.back().error);
        }
        error += 8 * U * largest;  // of any exponent
        if (row_max == -INFINITY) row_max = 0;
        double sum = p.sink_logits ? std::exp(p.sink_logits[h] - row_max) : 0;
        for (const Score& s : scores) sum += std::exp(s.value - row_max);
        const double lse = sum == 0 ? -INFINITY : row_max + std::log(sum);
        const double sum_rounding = (2.0 * seen.size() + 64) * U;
        want.lse.value[row] = lse;
        want.lse.error[row] = sum == 0 ? 0 : error + sum_rounding + 8 * U * std::fabs(lse);

        // exp(2 * error) - 1, and the roundings of the weight and of what it is divided by.
        const double off = std::expm1(2 * error) + sum_rounding + roundoff.weights + roundoff.keys;
        const double kept_share = 1 / (1 - (double)p.dropout);
        const auto factor = [&](int64_t j) { return kept.empty() ? 1.0 : kept[row * p.lk + j] * kept_share; };
        const auto scale = [&](int64_t j) {
            return p.v_scale.data ? p.v_scale.data[b * p.v_scale.batch + h / group * p.v_scale.head + j] : 1.0f;
        };
        std::vector<double> weights(seen.size());
        double heaviest = 0;
        for (size_t n = 0; n < seen.size(); ++n) {
            weights[n] = sum == 0 ? 0 : std::exp(scores[n].value - lse);
            heaviest = std::max(heaviest, weights[n] * factor(seen[n]) * scale(seen[n]));
        }
        for (size_t n = 0; n < seen.size(); ++n) {
            const double weight = weights[n] * factor(seen[n]);
            const double rounding = roundoff.of_fixed_point(heaviest * (1 + off)) / scale(seen[n]);
            add(want.out, row * p.value_width, v[first_key + seen[n]], weight, weight * off + rounding + LEAST, 4);
        }
        if (!g) continue;

        const Row& d_out = d_outs[row];
        Dot delta({}, {});
        double delta_error = 0;
        for (int64_t d = 0; d < p.value_width; ++d) {
            const int64_t at = row * p.value_width + d;
            delta.add(d_out[d] * want.out.value[at]);
            const double out_error = want.out.error[at] + (format.roundoff + 2 * U) * std::fabs(want.out.value[at]);
            delta_error += std::fabs(d_out[d]) * (1.01 * out_error + format.subnormal);
        }
        if (g->d_lse) delta.add(-(double)g->d_lse[row]);
        delta_error += (p.value_width + 4) * U * delta.size;
        const double weight_off = std::expm1(2 * error + want.lse.error[row]) + 64 * U;
        for (size_t n = 0; n < seen.size(); ++n) {
            const int64_t j = seen[n], key = first_key + j;
            const double weight = weights[n], share = factor(j);
            const Dot d_weight(d_out, v[key]);
            const double difference = share * d_weight.sum - delta.sum;
            double d_score = weight * difference;
            const double size = std::fabs(share * d_weight.sum) + std::fabs(delta.sum);
            double d_error = weight * (1 + weight_off) *
                                 (share * (p.value_width + 4) * U * d_weight.size + delta_error + 4 * U * size) +
                             (weight * weight_off + LEAST) * std::fabs(difference);
            want.d_bias.value[row * p.lk + j] = d_score;
            want.d_bias.error[row * p.lk + j] = d_error;
            const double distance = std::llabs(i + offset_of(p, b) - j);
            want.d_alibi.value[h] -= d_score * distance;
            want.d_alibi.error[h] += distance * (d_error + (p.lk + 8) * U * std::fabs(d_score));
            d_error = d_error * scores[n].slope + (std::fabs(d_score) + d_error) * scores[n].slope_error;
            d_score *= scores[n].slope;
            d_error += roundoff.weights * (std::fabs(d_score) + d_error);
            const double over_rows = p.lq * group + 8.0;
            add(want.dq, row * p.width, k[key], d_score, d_error, seen.size() + 8.0);
            add(want.dk, key * p.width, q[row], d_score, d_error, over_rows);
            add(want.dv, key * p.value_width, d_out, weight * share,
                share * (weight * (weight_off + roundoff.weights) + LEAST), over_rows);
        }
    }
    round(want.out, p.dtype, 1);
    if (g) {
        round(want.dq, p.dtype, p.scale);
        round(want.dk, p.dtype, p.scale);
        round(want.dv, p.dtype, 1);
    }
    return want;
}

}  // namespace qkv
