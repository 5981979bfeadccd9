// All layers of a decoder in one call: what model/decoder.py does operation by operation between
// the embedding and the head, with the same operations in the same order, so with the same bits.
//
// One team of threads lives for a whole step and meets at a barrier after each operation.

#include <algorithm>
#include <cstring>
#include <map>

#include "layer_program.h"
#include "paged_attention.h"
#include "parallel.h"
#include "row_operations.h"

namespace stepwire {
namespace {

int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : 2; }

// What lies between operations; layers use it one after the other.
struct Buffers {
  char *residual, *normed, *qkv, *query, *key, *attended, *attended_rows, *hidden, *gate_up, *gated;
  char* inputs;  // of a projection, as multiply wants them
  float* attention;

  // take: gets a number of bytes and returns where they are.
  template <class Take>
  Buffers(const LayerProgram& program, const StepArguments& step, size_t num_attention_floats,
          Take take) {
    const int64_t size = size_of(program.dtype), width = program.hidden_size;
    const int64_t heads = program.num_heads * program.head_dim;
    const int64_t kv_heads = program.num_kv_heads * program.head_dim;
    const int64_t inner = program.intermediate_size;
    // The same row may be wanted more than once.
    const int64_t tokens = std::max(step.num_tokens, step.num_logit_rows);
    residual = take(step.num_logit_rows * width * size);
    normed = take(tokens * width * size);
    qkv = take(tokens * (heads + 2 * kv_heads) * size);
    query = take(tokens * heads * size);
    key = take(tokens * kv_heads * size);
    attended = take(tokens * heads * size);
    attended_rows = take(step.num_logit_rows * heads * size);
    hidden = take(tokens * width * size);
    gate_up = take(tokens * 2 * inner * size);
    gated = take(tokens * inner * size);
    inputs = take(tokens * (std::max({width, heads, inner}) + 1) * sizeof(float));
    attention = reinterpret_cast<float*>(take(num_attention_floats * sizeof(float)));
  }
};

// Rows of another dtype or stride, zeros behind them.
template <class From, class To>
void copy_rows(const void* from, void* to, int64_t num_rows, int64_t size, int64_t stride) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < num_rows; ++row) {
    const From* source = static_cast<const From*>(from) + row * size;
    To* target = static_cast<To*>(to) + row * stride;
    for_vectors(size, [&](int64_t, auto get, auto put) { put(target, get(source)); });
    std::memset(static_cast<void*>(target + size), 0, (stride - size) * sizeof(To));
  }
}

class Step {
 public:
  Step(const LayerProgram& program, const CachePages& cache, const StepArguments& step)
      : program_(program), cache_(cache), step_(step) {}

  // Checks the arguments and plans the work; returns a RopeProblem or a StepProblem.
  int64_t prepare();
  size_t num_attention_floats() const;
  // Every thread of the team calls it.
  void run(const Buffers& buffers) const;

 private:
  // Of the first layer; what layers differ in is set later.
  RopeCall rope() const;
  AttentionCall attention(int64_t window) const;

  void rotate_and_attend(int64_t layer, const Buffers& buffers) const;
  void normalise(const void* x, const void* weight, void* residual, void* out, int64_t rows) const;
  void normalise_heads(const void* x, int64_t num_heads, const void* weight, void* out) const;
  void project(const void* x, int64_t rows, const Projection& projection, void* out,
               const Buffers& buffers) const;
  const void* dense_rows(const void* x, int64_t rows, int64_t size, int64_t stride,
                         char* inputs) const;
  void pick_logit_rows(const void* from, void* to, int64_t size) const;

  int64_t bytes(int64_t num_elements) const { return num_elements * size_of(program_.dtype); }
  int64_t heads_size() const { return program_.num_heads * program_.head_dim; }
  int64_t kv_heads_size() const { return program_.num_kv_heads * program_.head_dim; }
  int64_t qkv_stride() const { return heads_size() + 2 * kv_heads_size(); }

  const LayerProgram& program_;
  const CachePages& cache_;
  const StepArguments& step_;
  std::map<int64_t, AttentionPlan> plans_;  // by window
};

RopeCall Step::rope() const {
  RopeCall call{};
  call.dtype = program_.dtype;
  call.cos_sin = program_.cos_sin;
  call.max_positions = program_.max_positions;
  call.rotary_dim = program_.rotary_dim;
  call.positions = step_.positions;
  call.slots = step_.slots;
  call.page_dtype = cache_.dtype;
  call.num_slots = cache_.num_blocks * cache_.block_size;
  call.block_size = cache_.block_size;
  call.num_tokens = step_.num_tokens;
  call.num_heads = program_.num_heads;
  call.num_kv_heads = program_.num_kv_heads;
  call.head_dim = program_.head_dim;
  call.min_amax = program_.min_amax;
  return call;
}

AttentionCall Step::attention(int64_t window) const {
  AttentionCall call{};
  call.dtype = program_.dtype;
  call.page_dtype = cache_.dtype;
  call.num_blocks = cache_.num_blocks;
  call.cu_seqlens_q = step_.cu_seqlens_q;
  call.seq_lens = step_.seq_lens;
  call.block_table = step_.block_table;
  call.block_table_stride = step_.block_table_stride;
  call.num_seqs = step_.num_seqs;
  call.num_heads = program_.num_heads;
  call.num_kv_heads = program_.num_kv_heads;
  call.head_dim = program_.head_dim;
  call.block_size = cache_.block_size;
  call.window = window;
  return call;
}

int64_t Step::prepare() {
  if (const RopeProblem problem = find_problem(rope())) return problem;
  for (int64_t i = 0; i < step_.num_logit_rows; ++i)
    if (step_.logit_rows[i] < 0 || step_.logit_rows[i] >= step_.num_tokens)
      return LOGIT_ROW_OUTSIDE;
  if (step_.cu_seqlens_q[0] < 0 || step_.cu_seqlens_q[step_.num_seqs] > step_.num_tokens)
    return SEQUENCE_OUTSIDE;
  for (int64_t i = 0; i < program_.num_layers; ++i) {
    const int64_t window = program_.layers[i].window;
    if (plans_.count(window)) continue;
    const AttentionCall call = attention(window);
    if (!has_blocks(call)) return BLOCK_MISSING;
    plans_.emplace(window, AttentionPlan(call, step_.num_threads));
  }
  return NO_STEP_PROBLEM;
}

size_t Step::num_attention_floats() const {
  size_t most = 0;
  for (const auto& plan : plans_) most = std::max(most, plan.second.num_floats);
  return most;
}

void Step::normalise(const void* x, const void* weight, void* residual, void* out,
                     int64_t rows) const {
  const int64_t size = program_.hidden_size;
  rms_norm({x, size, size, program_.dtype, weight, program_.norm_dtype, residual, out,
            program_.eps, rows, 1, size});
}

void Step::normalise_heads(const void* x, int64_t num_heads, const void* weight, void* out) const {
  const int64_t size = program_.head_dim;
  rms_norm({x, qkv_stride(), size, program_.dtype, weight, program_.norm_dtype, nullptr, out,
            program_.eps, step_.num_tokens, num_heads, size});
}

// Rows as dense weights are multiplied with; where they must be converted, into `inputs`.
const void* Step::dense_rows(const void* x, int64_t rows, int64_t size, int64_t stride,
                             char* inputs) const {
  if (program_.dtype == F16)
    copy_rows<f16, float>(x, inputs, rows, size, stride);
  else if (program_.dtype == BF16 && !linear_takes_bf16())
    copy_rows<bf16, float>(x, inputs, rows, size, stride);
  else if (stride != size)
    copy_rows<bf16, bf16>(x, inputs, rows, size, stride);
  else
    return x;
  return inputs;
}

void Step::project(const void* x, int64_t rows, const Projection& projection, void* out,
                   const Buffers& buffers) const {
  const int64_t dtype = program_.dtype, size = projection.in_features;
  const int64_t stride = dtype == BF16 ? (size + 1) / 2 * 2 : size;
  const void* dense = nullptr;
  int64_t first = 0;
  for (int64_t i = 0; i < projection.num_parts; ++i) {
    const ProjectionPart& part = projection.parts[i];
    const void* bias = nullptr;
    if (projection.bias)
      bias = static_cast<const char*>(projection.bias) + first * size_of(projection.bias_dtype);
    void* to = static_cast<char*>(out) + bytes(first);
    if (part.quantized) {
      multiply(*part.quantized, x, size, dtype, bias, projection.bias_dtype, to,
               projection.out_features, dtype, rows);
      first += part.quantized->out_features;
      continue;
    }
    if (!dense) dense = dense_rows(x, rows, size, stride, buffers.inputs);
    multiply(*part.dense, dense, stride, bias, projection.bias_dtype, to, projection.out_features,
             dtype, rows);
    first += part.dense->out_features;
  }
}

void Step::pick_logit_rows(const void* from, void* to, int64_t size) const {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < step_.num_logit_rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * bytes(size),
                static_cast<const char*>(from) + step_.logit_rows[i] * bytes(size), bytes(size));
}

void Step::rotate_and_attend(int64_t layer, const Buffers& buffers) const {
  const LayerWeights& weights = program_.layers[layer];
  const LayerPages& pages = cache_.layers[layer];
  const int64_t head_dim = program_.head_dim;
  char* query = buffers.qkv;
  char* key = query + bytes(heads_size());
  int64_t query_stride = qkv_stride(), key_stride = qkv_stride();
  if (weights.query_norm) {
    normalise_heads(query, program_.num_heads, weights.query_norm, buffers.query);
    normalise_heads(key, program_.num_kv_heads, weights.key_norm, buffers.key);
    query = buffers.query;
    key = buffers.key;
    query_stride = heads_size();
    key_stride = kv_heads_size();
  }
  RopeCall turn = rope();
  turn.query = query;
  turn.key = key;
  turn.value = buffers.qkv + bytes(heads_size() + kv_heads_size());
  turn.query_strides[0] = query_stride;
  turn.key_strides[0] = key_stride;
  turn.value_strides[0] = qkv_stride();
  turn.query_strides[1] = turn.key_strides[1] = turn.value_strides[1] = head_dim;
  turn.key_pages = pages.key;
  turn.value_pages = pages.value;
  turn.key_scales = static_cast<bf16*>(pages.key_scales);
  turn.value_scales = static_cast<bf16*>(pages.value_scales);
  turn.key_offset = pages.key_offset;
  turn.mixing_size = pages.key_scales ? program_.mixing_size : 1;
  turn.static_key_scale = static_cast<float>(pages.static_key_scale);
  turn.static_value_scale = static_cast<float>(pages.static_value_scale);
  rope_and_write_kv(turn);
  AttentionCall call = attention(weights.window);
  call.query = query;
  call.query_strides[0] = query_stride;
  call.query_strides[1] = head_dim;
  call.key_pages = pages.key;
  call.value_pages = pages.value;
  call.key_scales = turn.key_scales;
  call.value_scales = turn.value_scales;
  call.out = buffers.attended;
  // Multiplied in double precision, as Python does.
  const double key_factor = pages.static_key_scale ? pages.static_key_scale : 1.0;
  call.scale = static_cast<float>(program_.attention_scale * key_factor);
  call.value_factor =
      pages.static_value_scale ? static_cast<float>(pages.static_value_scale) : 1.0f;
  attend(call, plans_.at(weights.window), buffers.attention);
}

void Step::run(const Buffers& buffers) const {
  const int64_t last = program_.num_layers - 1;
  char* residual = static_cast<char*>(step_.residual);
  const char* attended = buffers.attended;
  int64_t rows = step_.num_tokens;
  for (int64_t layer = 0; layer <= last; ++layer) {
    const LayerWeights& weights = program_.layers[layer];
    if (layer == 0)
      normalise(residual, weights.input_norm, nullptr, buffers.normed, rows);
    else
      normalise(buffers.hidden, weights.input_norm, residual, buffers.normed, rows);
    project(buffers.normed, rows, weights.qkv, buffers.qkv, buffers);
    rotate_and_attend(layer, buffers);
    if (layer == last) {  // past the last attention only the logit rows matter
      pick_logit_rows(attended, buffers.attended_rows, heads_size());
      pick_logit_rows(residual, buffers.residual, program_.hidden_size);
      attended = buffers.attended_rows;
      residual = buffers.residual;
      rows = step_.num_logit_rows;
    }
    project(attended, rows, weights.attention_output, buffers.hidden, buffers);
    normalise(buffers.hidden, weights.mlp_norm, residual, buffers.normed, rows);
    project(buffers.normed, rows, weights.gate_up, buffers.gate_up, buffers);
    silu_and_mul(buffers.gate_up, 2 * program_.intermediate_size, program_.dtype, buffers.gated,
                 rows, program_.intermediate_size);
    project(buffers.gated, rows, weights.down, buffers.hidden, buffers);
  }
  normalise(buffers.hidden, program_.final_norm, residual, step_.out, rows);
}

}  // namespace
}  // namespace stepwire

// Bytes of the structures that a caller lays out, to compare with its own.
extern "C" int64_t stepwire_layer_struct_bytes(int64_t index) {
  using namespace stepwire;
  constexpr int64_t SIZES[] = {sizeof(DenseWeight),  sizeof(ProjectionPart), sizeof(Projection),
                               sizeof(LayerWeights), sizeof(LayerProgram),   sizeof(LayerPages),
                               sizeof(CachePages),   sizeof(StepArguments)};
  return SIZES[index];
}

// Writes every token's KV and the logit rows' normalised states. Returns a RopeProblem or a
// StepProblem; nothing is written where there is one.
extern "C" int64_t stepwire_run_layers(const stepwire::LayerProgram* program,
                                       const stepwire::CachePages* cache,
                                       const stepwire::StepArguments* arguments) {
  using namespace stepwire;
  Step step(*program, *cache, *arguments);
  if (const int64_t problem = step.prepare()) return problem;
  static thread_local Scratch scratch;
  size_t size = 0;
  const auto count = [&](size_t wanted) {
    size += (wanted + 63) / 64 * 64;
    return static_cast<char*>(nullptr);
  };
  Buffers(*program, *arguments, step.num_attention_floats(), count);
  char* next = scratch.get<char>(size);
  const auto take = [&](size_t wanted) {
    char* taken = next;
    next += (wanted + 63) / 64 * 64;
    return taken;
  };
  const Buffers buffers(*program, *arguments, step.num_attention_floats(), take);
  // Rows past the last sequence's, which pad a batch, attend to nothing.
  const int64_t row = program->num_heads * program->head_dim * size_of(program->dtype);
  const int64_t end = arguments->cu_seqlens_q[arguments->num_seqs];
  std::memset(buffers.attended + end * row, 0, (arguments->num_tokens - end) * row);
#pragma omp parallel num_threads(static_cast<int>(arguments->num_threads))
  step.run(buffers);
  return NO_STEP_PROBLEM;
}
