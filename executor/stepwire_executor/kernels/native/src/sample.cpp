// Greedy and Gumbel-max sampling with top-k, min-p and top-p.
//
// A row is one thread's work and a function of that row alone. Limits are found by selection,
// never by sorting the vocabulary: a bound that is cheap to compute leaves few candidates.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "philox.h"
#include "vec.h"

namespace stepwire {
namespace {

struct Params {
  float temperature;  // 0: greedy
  int64_t top_k;      // 0: all
  float top_p, min_p;
  NoiseKey key;
};

struct Candidate {
  float score;  // (logit - largest) / temperature
  float weight;  // e^score
  uint32_t token_id;
};

bool is_likelier(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token_id < b.token_id);
}

vu first_ids() {
  vu ids;
  for (int i = 0; i < W; ++i) ids[i] = i;
  return ids;
}

// The largest value seen; of equal ones that of the smallest token id.
struct Best {
  vf value = splat(-INF);
  vu token_id = {};

  void see(vf values, vu ids) {
    const vi is_better = values > value;
    value = is_better ? values : value;
    token_id = is_better ? ids : token_id;
  }
  // Lanes were fed ids in ascending order, so each holds its smallest.
  uint32_t winner(float& score) const {
    float values[W];
    uint32_t ids[W];
    store_as(values, value);
    store_as(ids, token_id);
    int best = 0;
    for (int i = 1; i < W; ++i)
      if (values[i] > values[best] || (values[i] == values[best] && ids[i] < ids[best])) best = i;
    score = values[best];
    return ids[best];
  }
};

// W logits from token id i on; -inf past the vocabulary's end.
vf logits_at(const float* logits, int64_t i, int64_t vocab_size) {
  if (i + W <= vocab_size) return load(logits + i);
  float lanes[W];
  std::fill_n(lanes, W, -INF);
  std::copy_n(logits + i, std::max<int64_t>(0, vocab_size - i), lanes);
  return load(lanes);
}

// Whether some logit is finite and none is NaN or +inf.
bool find_largest(const float* logits, int64_t vocab_size, float& largest, uint32_t& token_id) {
  Best best;
  vi is_nan = {};
  vu ids = first_ids();
  for (int64_t i = 0; i < vocab_size; i += W, ids += W) {
    const vf x = logits_at(logits, i, vocab_size);
    is_nan |= x != x;
    best.see(x, ids);
  }
  token_id = best.winner(largest);
  return !any(is_nan) && largest > -INF && largest < INF;
}

uint32_t sample_all(const float* logits, int64_t vocab_size, float largest, const Params& params) {
  Best best;
  vu ids = first_ids();
  for (int64_t i = 0; i < vocab_size; i += 2 * W) {
    vu bits[2];
    noise_bits(i / 4, params.key, bits);
    for (int half = 0; half < 2; ++half, ids += W) {
      const vf x = logits_at(logits, i + half * W, vocab_size);
      best.see((x - largest) / params.temperature + gumbel(bits[half]), ids);
    }
  }
  float score;
  return best.winner(score);
}

uint32_t sample_among(const Candidate* candidates, int64_t count, const NoiseKey& key) {
  float best = -INF;
  uint32_t chosen = candidates[0].token_id;
  for (int64_t i = 0; i < count; i += W) {
    uint32_t ids[W] = {}, bits[W];
    const int64_t n = std::min<int64_t>(W, count - i);
    for (int64_t j = 0; j < n; ++j) ids[j] = candidates[i + j].token_id;
    noise_bits_at(ids, key, bits);
    noise_bits_at(ids + Q, key, bits + Q);
    float noise[W];
    store(noise, gumbel(load_as<vu>(bits)));
    for (int64_t j = 0; j < n; ++j) {
      const float score = candidates[i + j].score + noise[j];
      if (score > best || (score == best && ids[j] < chosen)) {
        best = score;
        chosen = ids[j];
      }
    }
  }
  return chosen;
}

// A score that at least k tokens reach: the k-th largest of the maxima of groups of tokens.
float bound_of_top_k(const float* scores, int64_t vocab_size, int64_t k, float* maxima) {
  constexpr int64_t GROUP = 2 * W;
  int64_t count = 0;
  for (int64_t i = 0; i + GROUP <= vocab_size; i += GROUP) {
    float best = scores[i];
    for (int64_t j = 1; j < GROUP; ++j) best = std::max(best, scores[i + j]);
    maxima[count++] = best;
  }
  if (k > count) return -INF;
  std::nth_element(maxima, maxima + k - 1, maxima + count, std::greater<float>());
  return maxima[k - 1];
}

// Length of the shortest run of likeliest candidates whose weights reach target; they are moved
// to the front. Quickselect on the weight: the side that cannot hold the limit is not looked at
// again.
int64_t select_mass(Candidate* candidates, int64_t count, double target) {
  int64_t low = 0, high = count;
  double mass = 0.0;  // of candidates before low, which are the likeliest
  while (high - low > 32) {
    Candidate& a = candidates[low];
    Candidate& b = candidates[low + (high - low) / 2];
    Candidate& c = candidates[high - 1];
    // The median of three goes to the front.
    if (is_likelier(a, b) == is_likelier(a, c))
      std::swap(a, is_likelier(b, a) != is_likelier(b, c) ? b : c);
    const Candidate pivot = candidates[low];
    const auto middle = std::partition(
        candidates + low + 1, candidates + high,
        [&pivot](const Candidate& x) { return is_likelier(x, pivot); });
    const int64_t place = middle - candidates - 1;
    std::swap(candidates[low], candidates[place]);
    double before = 0.0;
    for (int64_t i = low; i < place; ++i) before += candidates[i].weight;
    if (mass + before >= target) {
      high = place;
    } else {
      mass += before + pivot.weight;
      low = place + 1;
      if (mass >= target) return low;
    }
  }
  std::sort(candidates + low, candidates + high, is_likelier);
  for (; low < high && mass < target; ++low) mass += candidates[low].weight;
  return low;
}

uint32_t sample_limited(const float* logits, int64_t vocab_size, float largest,
                        const Params& params, Scratch& score_memory, Scratch& list_memory) {
  const int64_t padded = (vocab_size + W - 1) / W * W;
  const bool has_top_k = params.top_k > 0 && params.top_k < vocab_size;
  float* scores = score_memory.get<float>(2 * padded);
  for (int64_t i = 0; i < vocab_size; i += W)
    store(scores + i, (logits_at(logits, i, vocab_size) - largest) / params.temperature);

  // What cannot be in the result: below the k-th largest, below min-p, or so unlikely that all
  // such tokens together do not make up 1 - top_p.
  float least_score = -INF, least_weight = params.min_p;
  double mass = 0.0;
  if (has_top_k) {
    least_score = bound_of_top_k(scores, vocab_size, params.top_k, scores + padded);
  } else if (params.top_p < 1.0f) {
    for (int64_t i = 0; i < vocab_size; i += W) {
      const vf weight = exp(load(scores + i));
      mass += sum(weight >= params.min_p ? weight : vf{});
    }
    const double share = (1.0 - params.top_p) * mass / static_cast<double>(vocab_size);
    least_weight = std::max(least_weight, static_cast<float>(share * 0.999));
  }

  auto* candidates = list_memory.get<Candidate>(padded);
  int64_t count = 0;
  for (int64_t i = 0; i < vocab_size; i += W) {
    const vf score = load(scores + i);
    if (!any(score >= least_score)) continue;
    const vf weight = exp(score);
    // min-p comes after top-k, so tokens below it still take places among the k.
    const vi is_kept = (score >= least_score) & (has_top_k ? score == score : weight >= least_weight);
    if (!any(is_kept)) continue;
    for (int j = 0; j < W && i + j < vocab_size; ++j)
      if (is_kept[j]) candidates[count++] = {score[j], weight[j], static_cast<uint32_t>(i + j)};
  }
  if (has_top_k) {
    if (params.top_k < count) {
      std::nth_element(candidates, candidates + params.top_k - 1, candidates + count, is_likelier);
      count = params.top_k;
    }
    count = std::partition(candidates, candidates + count,
                           [&params](const Candidate& x) { return x.weight >= params.min_p; }) -
            candidates;
    mass = 0.0;
    for (int64_t i = 0; i < count; ++i) mass += candidates[i].weight;
  }
  if (params.top_p < 1.0f)
    count = std::max<int64_t>(1, select_mass(candidates, count, params.top_p * mass));
  return sample_among(candidates, count, params.key);
}

}  // namespace
}  // namespace stepwire

// One token a row. is_finite[row] is 0, and the token 0, where a logit is NaN or +inf or all are
// -inf. logits rows are stride elements apart.
extern "C" void stepwire_sample(const float* logits, int64_t stride, int64_t num_rows,
                                int64_t vocab_size, const float* temperature,
                                const int32_t* top_k, const float* top_p, const float* min_p,
                                const int64_t* seeds, const int64_t* positions,
                                const int64_t* streams, int64_t* token_ids, uint8_t* is_finite,
                                int64_t num_threads) {
  using namespace stepwire;
#pragma omp parallel for num_threads(static_cast<int>(num_threads)) schedule(dynamic, 1)
  for (int64_t row = 0; row < num_rows; ++row) {
    static thread_local Scratch scores, candidates;
    const float* x = logits + row * stride;
    const auto seed = static_cast<uint64_t>(seeds[row]);
    const Params params{
        temperature[row],
        top_k[row],
        top_p[row],
        min_p[row],
        {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
         static_cast<uint32_t>(positions[row]), static_cast<uint32_t>(streams[row])}};
    float largest;
    uint32_t token_id;
    is_finite[row] = find_largest(x, vocab_size, largest, token_id);
    if (!is_finite[row])
      token_id = 0;
    else if (params.temperature > 0.0f)
      token_id = (params.top_k > 0 && params.top_k < vocab_size) || params.top_p < 1.0f ||
                         params.min_p > 0.0f
                     ? sample_limited(x, vocab_size, largest, params, scores, candidates)
                     : sample_all(x, vocab_size, largest, params);
    token_ids[row] = token_id;
  }
}

// The noise alone, for comparison with its definition: bits and noise are [vocab_size].
extern "C" void stepwire_gumbel_noise(int64_t seed, int64_t position, int64_t stream,
                                      int64_t vocab_size, uint32_t* bits, float* noise) {
  using namespace stepwire;
  const NoiseKey key{static_cast<uint32_t>(seed),
                     static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32),
                     static_cast<uint32_t>(position), static_cast<uint32_t>(stream)};
  for (int64_t i = 0; i < vocab_size; i += 2 * W) {
    vu words[2];
    noise_bits(i / 4, key, words);
    for (int half = 0; half < 2; ++half) {
      const int64_t first = i + half * W;
      const int64_t n = std::min<int64_t>(W, vocab_size - first);
      if (n <= 0) break;
      const vf values = gumbel(words[half]);
      std::memcpy(bits + first, &words[half], n * sizeof(uint32_t));
      std::memcpy(noise + first, &values, n * sizeof(float));
    }
  }
}
