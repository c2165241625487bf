/*
 * Engraft: adapts a quantized small language model (GGUF) on the device that uses it.
 *
 * - Every function returns a code: 0, or a negative ENGRAFT_* code; engraft_message says more.
 * - Functions whose last parameter is a T ** make a handle; the matching _free frees it. Handles are numbers,
 *   not addresses: a freed one is refused with ENGRAFT_MISUSE. NULL may always be freed.
 * - Texts are a pointer and a length in bytes, UTF-8.
 * - Structs begin with struct_size. The functions *_default_params(&params, sizeof params) set it and zero all
 *   other fields; zero always means the default. Structs only grow at the end.
 * - Trainers, gates and sessions serve one call at a time; other calls get ENGRAFT_BUSY. Threads may share all
 *   other handles. Four functions steer a running call and may be called from anywhere: cancel, pause, resume
 *   and set_thermal.
 * - Callbacks take void *user last, are called with no lock held, and must not unwind (throw, longjmp).
 *
 * Made from targets/capi/src by cbindgen: change the sources, not this file.
 */

#ifndef ENGRAFT_H
#define ENGRAFT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * Version of this interface: the major version in the upper half, the minor version in the lower. A program
 * works with libraries of the same major version and the same or a higher minor version.
 */
#define ENGRAFT_ABI_VERSION (1 << 16)

/**
 * Trained parameters.
 */
#define ENGRAFT_KIND_ADAPTER 1

/**
 * Examples that go before every prompt.
 */
#define ENGRAFT_KIND_FEW_SHOT 2

/**
 * Nothing: only the base.
 */
#define ENGRAFT_KIND_BASE 3

/**
 * The device is cool: work at full speed. As `ProcessInfo.ThermalState.nominal`.
 */
#define ENGRAFT_THERMAL_NOMINAL 0

/**
 * It is warm: rest a tenth of the time.
 */
#define ENGRAFT_THERMAL_FAIR 1

/**
 * It is hot: rest half of the time.
 */
#define ENGRAFT_THERMAL_SERIOUS 2

/**
 * It is too hot: wait until this changes.
 */
#define ENGRAFT_THERMAL_CRITICAL 3

/**
 * The rows belong to no known task.
 */
#define ENGRAFT_TASK_NONE 0

/**
 * GSM8K: answers after `####`.
 */
#define ENGRAFT_TASK_GSM8K 1

/**
 * Orca-Math: answers in prose.
 */
#define ENGRAFT_TASK_ORCA_MATH 2

/**
 * SVAMP: one-step word problems.
 */
#define ENGRAFT_TASK_SVAMP 3

/**
 * Success.
 */
#define ENGRAFT_OK 0

/**
 * The operating system failed to read or write.
 */
#define ENGRAFT_IO -1

/**
 * The disk or a quota is full.
 */
#define ENGRAFT_FULL -2

/**
 * Out of memory.
 */
#define ENGRAFT_NOMEM -3

/**
 * A file doesn't match its format: truncated, damaged or foreign.
 */
#define ENGRAFT_CORRUPT -4

/**
 * An argument is out of range, contradicts another, or isn't a live handle.
 */
#define ENGRAFT_MISUSE -5

/**
 * Another call runs on the handle, or another writer uses the folder or store.
 */
#define ENGRAFT_BUSY -6

/**
 * The caller asked to stop.
 */
#define ENGRAFT_CANCELLED -7

/**
 * A struct has fields set that this version of the library doesn't know.
 */
#define ENGRAFT_UNSUPPORTED_VERSION -8

/**
 * An adapter and a model don't belong together.
 */
#define ENGRAFT_BASE_MISMATCH -9

/**
 * NaN or infinity where a finite number is needed.
 */
#define ENGRAFT_NONFINITE -10

/**
 * The memory plan exceeds the budget. The message says what would fit.
 */
#define ENGRAFT_DOES_NOT_FIT -11

/**
 * The gate didn't promote.
 */
#define ENGRAFT_GATE_REFUSED -12

/**
 * A bug in the library. The handle can only be freed.
 */
#define ENGRAFT_PANIC -13

/**
 * The data is malformed or leaves nothing to train on.
 */
#define ENGRAFT_BAD_DATA -14

/**
 * The file is good, but this version can't handle its contents.
 */
#define ENGRAFT_UNSUPPORTED -15

/**
 * The caller's buffer is too small. It holds the beginning; the length is that of the whole.
 */
#define ENGRAFT_TOO_SMALL -16

/**
 * Examples in the prompt.
 */
#define ENGRAFT_ARM_FEW_SHOT 1

/**
 * A LoRA adapter.
 */
#define ENGRAFT_ARM_LORA 2

/**
 * A DoRA adapter.
 */
#define ENGRAFT_ARM_DORA 4

/**
 * Don't compare answers, except as the data's task says.
 */
#define ENGRAFT_METRIC_NONE 0

/**
 * Compare answers word for word, except for white space.
 */
#define ENGRAFT_METRIC_EXACT 1

/**
 * Compare answers as JSON, all fields equal.
 */
#define ENGRAFT_METRIC_JSON 2

/**
 * Nothing has been judged yet.
 */
#define ENGRAFT_DECISION_NONE 0

/**
 * Promote a trained arm.
 */
#define ENGRAFT_DECISION_PROMOTE 1

/**
 * Keep prompting: examples in the prompt help, and no trained arm passed.
 */
#define ENGRAFT_DECISION_KEEP_PROMPTING 2

/**
 * Keep the base alone.
 */
#define ENGRAFT_DECISION_KEEP_BASE 3

/**
 * Keep the store's active generation: nothing is shown to be better.
 */
#define ENGRAFT_DECISION_KEEP_ACTIVE 4

/**
 * No lines.
 */
#define ENGRAFT_LOG_NONE 0

/**
 * Errors.
 */
#define ENGRAFT_LOG_ERROR 1

/**
 * Warnings that a user should see.
 */
#define ENGRAFT_LOG_WARN 2

/**
 * Choices that the library made.
 */
#define ENGRAFT_LOG_INFO 3

/**
 * Details for finding a bug.
 */
#define ENGRAFT_LOG_DEBUG 4

/**
 * The query projection, in `modules`.
 */
#define ENGRAFT_MODULE_Q 1

/**
 * The key projection.
 */
#define ENGRAFT_MODULE_K 2

/**
 * The value projection.
 */
#define ENGRAFT_MODULE_V 4

/**
 * The output projection.
 */
#define ENGRAFT_MODULE_O 8

/**
 * The MLP's gate projection.
 */
#define ENGRAFT_MODULE_GATE 16

/**
 * The MLP's up projection.
 */
#define ENGRAFT_MODULE_UP 32

/**
 * The MLP's down projection.
 */
#define ENGRAFT_MODULE_DOWN 64

/**
 * The learning rate falls linearly to zero.
 */
#define ENGRAFT_SCHEDULE_LINEAR 0

/**
 * The learning rate falls to zero along half a cosine.
 */
#define ENGRAFT_SCHEDULE_COSINE 1

/**
 * The learning rate stays the same.
 */
#define ENGRAFT_SCHEDULE_CONSTANT 2

/**
 * A step is done; the fields from `step` on describe it.
 */
#define ENGRAFT_EVENT_STEP 0

/**
 * The validation rows were evaluated; `valid_loss` is their loss. Only from gates.
 */
#define ENGRAFT_EVENT_VALIDATION 1

/**
 * The call is paused, or the device is too hot: it waits once this event's callback has returned.
 */
#define ENGRAFT_EVENT_HELD 2

/**
 * A note; see `text`.
 */
#define ENGRAFT_EVENT_NOTE 3

/**
 * Keys and values take 2 bytes per element.
 */
#define ENGRAFT_CACHE_F16 0

/**
 * 4 bytes per element, exact.
 */
#define ENGRAFT_CACHE_F32 1

/**
 * 8 bits per element, in blocks of 32.
 */
#define ENGRAFT_CACHE_Q8 2

/**
 * A prompt is put as the session's adapter was trained: into the model's chat template or as a text; as a text without
 * an adapter, or where that isn't known.
 */
#define ENGRAFT_PROMPT_AS_TRAINED 0

/**
 * A prompt is the user's message in the model's chat template.
 */
#define ENGRAFT_PROMPT_CHAT 1

/**
 * A prompt is the beginning of a text.
 */
#define ENGRAFT_PROMPT_TEXT 2

/**
 * The model ended its text.
 */
#define ENGRAFT_ENDED_MODEL 0

/**
 * The token limit was reached.
 */
#define ENGRAFT_ENDED_LIMIT 1

/**
 * The context is full.
 */
#define ENGRAFT_ENDED_CONTEXT 2

/**
 * The caller stopped it.
 */
#define ENGRAFT_ENDED_CANCELLED 3

/**
 * What is added to a model. Immutable; any number of threads and sessions may use it at once.
 */
typedef struct engraft_adapter engraft_adapter;

/**
 * Rows for training and validation. Immutable; any number of threads may use it at once.
 */
typedef struct engraft_data engraft_data;

/**
 * A comparison of arms and its verdict. One call at a time; functions that steer it may be called from anywhere.
 */
typedef struct engraft_gate engraft_gate;

/**
 * A model, opened by `engraft_model_open`. Any number of threads may use it at once.
 */
typedef struct engraft_model engraft_model;

/**
 * A memory plan. Immutable; any number of threads may use it at once.
 */
typedef struct engraft_plan engraft_plan;

/**
 * A sequence with its cache. One call at a time; `engraft_session_cancel` may be called from anywhere.
 */
typedef struct engraft_session engraft_session;

/**
 * A place that sessions take their adapter from. `engraft_slot_swap` may be called at any time, from any
 * thread. A slot belongs to one model and keeps it: that of the first adapter put into it, or of the first
 * session that follows it.
 */
typedef struct engraft_slot engraft_slot;

/**
 * A folder of generations. Any number of threads may use it at once. Only one writer, of all processes, may
 * change it at a time; others get `BUSY`.
 */
typedef struct engraft_store engraft_store;

/**
 * A training run. One call at a time; functions that steer it may be called from anywhere.
 */
typedef struct engraft_trainer engraft_trainer;

/**
 * How to load an adapter. Zero is the default for every field.
 */
typedef struct {
  /**
   * `sizeof(engraft_adapter_params)`.
   */
  uint32_t struct_size;
  /**
   * 1 accepts an adapter made for another base if its shapes fit. It can't be saved or promoted then.
   */
  uint32_t force_base;
  /**
   * Factor on its effect (0: 1, as trained). With any other factor it can't be saved or promoted.
   */
  float scale;
  /**
   * Threads for loading it (0: as many as there are cores).
   */
  uint32_t threads;
} engraft_adapter_params;

/**
 * Facts about an adapter.
 */
typedef struct {
  /**
   * `sizeof(engraft_adapter_info)`.
   */
  uint32_t struct_size;
  /**
   * `ENGRAFT_KIND_ADAPTER`, `ENGRAFT_KIND_FEW_SHOT` or `ENGRAFT_KIND_BASE`; for the last two all else is 0.
   */
  uint32_t kind;
  /**
   * The largest rank of a projection.
   */
  uint32_t rank;
  /**
   * 1 for DoRA.
   */
  uint32_t dora;
  /**
   * Parameters.
   */
  uint64_t parameters;
  /**
   * Steps that it was trained for.
   */
  uint64_t steps;
  /**
   * Trained tokens: those that counted in the loss.
   */
  uint64_t tokens;
  /**
   * Held-out loss of the base in nats per token; NaN if unknown.
   */
  float valid_loss_before;
  /**
   * Held-out loss with the adapter; NaN if unknown.
   */
  float valid_loss_after;
} engraft_adapter_info;

/**
 * How to read rows. Zero is the default for every field.
 */
typedef struct {
  /**
   * `sizeof(engraft_data_params)`.
   */
  uint32_t struct_size;
  /**
   * Maximum tokens per row; longer rows are cut (0: 256). Limited to what the model was trained on.
   */
  uint32_t max_seq_length;
  /**
   * 1 trains on every token instead of only on answers.
   */
  uint32_t no_mask_prompt;
  /**
   * 1 joins prompt and completion without the model's chat template.
   */
  uint32_t raw;
  /**
   * `ENGRAFT_TASK_*`: how to ask the questions and read the answers.
   */
  uint32_t task;
  /**
   * Must be 0.
   */
  uint32_t reserved;
  /**
   * Share of the rows to hold out if no validation rows are given (0: 0.1; negative: none).
   */
  double valid_fraction;
  /**
   * Seed for that choice.
   */
  uint64_t split_seed;
} engraft_data_params;

/**
 * Facts about the rows.
 */
typedef struct {
  /**
   * `sizeof(engraft_data_info)`.
   */
  uint32_t struct_size;
  /**
   * 1 if the validation rows were split off by seed.
   */
  uint32_t split_by_seed;
  /**
   * Training rows.
   */
  uint64_t train_rows;
  /**
   * Tokens in the training rows that count in the loss.
   */
  uint64_t train_tokens;
  /**
   * Validation rows.
   */
  uint64_t valid_rows;
  /**
   * Tokens in the validation rows that count in the loss.
   */
  uint64_t valid_tokens;
  /**
   * Skipped rows; `engraft_data_skipped` names them.
   */
  uint64_t skipped;
  /**
   * Rows that were cut.
   */
  uint64_t truncated;
  /**
   * Validation rows that are also training rows, which make the result look too good.
   */
  uint64_t duplicates;
  /**
   * Positions of the longest row.
   */
  uint64_t rows_max;
} engraft_data_info;

/**
 * What to compare. Zero is the default for every field.
 */
typedef struct {
  /**
   * `sizeof(engraft_gate_params)`.
   */
  uint32_t struct_size;
  /**
   * `ENGRAFT_ARM_*` to compare with the base alone (0: all). Without few-shot, training needn't beat it.
   */
  uint32_t arms;
  /**
   * Examples in a few-shot prompt, at most 64 (0: 5).
   */
  uint32_t shots;
  /**
   * Steps per trained arm (0: 300).
   */
  uint32_t steps;
  /**
   * Sequences per step (0: 8 for a protected LoRA, else 1).
   */
  uint32_t batch_size;
  /**
   * Rank of the adapters (0: the largest that memory allows, up to 64 for a protected LoRA; for others up to 16, as
   * rows allow).
   */
  uint32_t rank;
  /**
   * `ENGRAFT_METRIC_*`; the data's task overrides it.
   */
  uint32_t metric;
  /**
   * Maximum tokens per answer, up to 65536 (0: 256).
   */
  uint32_t answer_tokens;
  /**
   * Maximum number of training rows (0: all).
   */
  uint32_t train_rows;
  /**
   * Maximum number of held-out rows (0: all).
   */
  uint32_t held_out_rows;
  /**
   * Minimum number of held-out rows for a decision (0: 20).
   */
  uint32_t examples_min;
  /**
   * Bootstrap resamples (0: 10000).
   */
  uint32_t resamples;
  /**
   * Evaluations on the validation rows per run (0: 10).
   */
  uint32_t evaluations;
  /**
   * Threads (0: as many as there are cores).
   */
  uint32_t threads;
  /**
   * 1 keeps activations in 32 bits.
   */
  uint32_t exact;
  /**
   * 1 lets a lower loss win even if no more answers are right.
   */
  uint32_t loss_alone;
  /**
   * 1 leaves out the built-in text that training must not harm. Then supply your own.
   */
  uint32_t no_built_in_retention;
  /**
   * 1 lets a LoRA act on what ordinary text uses, too. By default it keeps to directions that such text leaves quiet,
   * which costs some gain and saves most of what a plain LoRA forgets.
   */
  uint32_t protect_off;
  /**
   * Minutes for everything instead of steps: training takes what scoring leaves (0: use steps).
   */
  double minutes;
  /**
   * Peak learning rate (0: 2e-3 for a protected LoRA, else found by a range test).
   */
  double learning_rate;
  /**
   * Two-sided significance level of intervals and tests (0: 0.05).
   */
  double level;
  /**
   * Seed for adapters, examples and the bootstrap.
   */
  uint64_t seed;
  /**
   * Bytes of private memory that training and scoring may take (0: what the machine leaves this process).
   */
  uint64_t memory_budget;
  /**
   * A text that training must not harm, in addition to the built-in one: UTF-8. Lines that start with `%% `
   * separate passages; without them it is one passage. The library keeps a copy. NULL for none.
   */
  const char *retention;
  /**
   * Bytes of `retention`.
   */
  size_t retention_length;
  /**
   * Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: off). Adds about half the time.
   */
  double kl_weight;
  /**
   * Data whose training rows the model already knows, mixed into the batches. NULL for none.
   */
  const engraft_data *replay;
  /**
   * Number of rows to sample from the base instead (0: none).
   */
  uint32_t replay_count;
  /**
   * Maximum tokens per sampled row (0: 64).
   */
  uint32_t replay_tokens;
  /**
   * Share of replayed rows, at most 0.9 (0: 0.1 if there is something to replay).
   */
  double replay_share;
  /**
   * Data whose answers training must not harm, in addition to retention texts: all its rows. NULL for none.
   */
  const engraft_data *retention_rows;
  /**
   * A folder for unfinished work, in UTF-8, created if missing. The same comparison continues from it after the
   * process has ended, and a diverging run returns to it. NULL for none. The library keeps a copy.
   */
  const char *unfinished;
  /**
   * Bytes of `unfinished`.
   */
  size_t unfinished_length;
  /**
   * A store whose active generation is compared, too: nothing replaces it that isn't better. NULL for none.
   */
  const engraft_store *store;
} engraft_gate_params;

/**
 * The progress of a run.
 */
typedef struct {
  /**
   * The struct's size in the library's version.
   */
  uint32_t struct_size;
  /**
   * `ENGRAFT_EVENT_*`.
   */
  uint32_t event;
  /**
   * Steps done.
   */
  uint64_t step;
  /**
   * Steps of the whole run; 0 while unknown.
   */
  uint64_t steps;
  /**
   * Tokens that went through the model.
   */
  uint64_t tokens;
  /**
   * Mean loss of the last step, in nats per token; NaN before the first.
   */
  double loss;
  /**
   * Loss on the validation rows at their last evaluation; NaN before the first.
   */
  double valid_loss;
  /**
   * Learning rate of the last step.
   */
  double learning_rate;
  /**
   * Norm of the last step's gradient, before scaling it down.
   */
  double grad_norm;
  /**
   * Tokens per second of work.
   */
  double tokens_per_s;
  /**
   * Seconds of work.
   */
  double seconds;
  /**
   * The gate's arm, or a note's text: UTF-8, not NUL-terminated, valid during the callback. NULL for none.
   */
  const char *text;
  /**
   * Bytes of `text`.
   */
  size_t text_length;
} engraft_progress;

/**
 * Receives progress; returning false cancels. Called on the thread of the call that it was passed to.
 */
typedef bool (*engraft_progress_callback)(const engraft_progress *progress, void *user);

/**
 * Takes a line: its level and its text, which isn't NUL-terminated. Called from any thread, also from several
 * at once. It must not wait for another thread that calls `engraft_log_set`.
 */
typedef void (*engraft_log_callback)(int32_t level, const char *text, size_t length, void *user);

/**
 * How to open a model. Zero is the default for every field.
 */
typedef struct {
  /**
   * `sizeof(engraft_model_params)`.
   */
  uint32_t struct_size;
  /**
   * 1 reads the file into private memory instead of mapping it. For files that may be truncated during use,
   * which would kill a process that maps them.
   */
  uint32_t no_mmap;
  /**
   * A folder that caches digests of model files, so that each is fully read only once: UTF-8. NULL for none.
   */
  const char *digest_cache;
  /**
   * Bytes of `digest_cache`.
   */
  size_t digest_cache_length;
} engraft_model_params;

/**
 * Facts about a model.
 */
typedef struct {
  /**
   * `sizeof(engraft_model_info)`.
   */
  uint32_t struct_size;
  /**
   * Tokens of the vocabulary.
   */
  uint32_t vocab;
  /**
   * Width.
   */
  uint32_t d_model;
  /**
   * Transformer blocks.
   */
  uint32_t n_layers;
  /**
   * Query heads.
   */
  uint32_t n_heads;
  /**
   * Key and value heads.
   */
  uint32_t n_kv_heads;
  /**
   * Width of the MLP.
   */
  uint32_t d_ff;
  /**
   * Positions that it was trained on.
   */
  uint32_t context_length;
  /**
   * Weights.
   */
  uint64_t parameters;
  /**
   * Bytes of the file that are mapped: clean pages, which the system may drop.
   */
  uint64_t mapped_bytes;
  /**
   * Bytes of private memory, without the tokenizer.
   */
  uint64_t private_bytes;
  /**
   * Bytes of private memory that the tokenizer takes once needed.
   */
  uint64_t tokenizer_bytes;
} engraft_model_info;

/**
 * How to train an adapter. Zero is the default for every field.
 */
typedef struct {
  /**
   * `sizeof(engraft_train_params)`.
   */
  uint32_t struct_size;
  /**
   * Rank of the adapter, at most 256 (0: 8).
   */
  uint32_t rank;
  /**
   * Alpha: the adapter's effect is scaled by alpha/rank (0: twice the rank).
   */
  float alpha;
  /**
   * Share of the adapter's inputs set to zero during training, below 1.
   */
  float dropout;
  /**
   * `ENGRAFT_MODULE_*`: which projections to adapt (0: all seven).
   */
  uint32_t modules;
  /**
   * How many of the last blocks to adapt (0: all).
   */
  uint32_t num_layers;
  /**
   * 1 for DoRA.
   */
  uint32_t dora;
  /**
   * 1 scales by alpha/sqrt(rank) instead.
   */
  uint32_t rslora;
  /**
   * Sequences per batch (0: 1).
   */
  uint32_t batch_size;
  /**
   * Batches to sum gradients over before each step (0: 1).
   */
  uint32_t grad_accumulation_steps;
  /**
   * `ENGRAFT_SCHEDULE_*`.
   */
  uint32_t schedule;
  /**
   * Steps of rising learning rate at the start.
   */
  uint32_t warmup_steps;
  /**
   * Optimizer steps of the whole run (0: 300).
   */
  uint64_t steps;
  /**
   * Peak learning rate (0: 2e-4).
   */
  double learning_rate;
  /**
   * AdamW's decoupled weight decay.
   */
  double weight_decay;
  /**
   * Scale gradients down to this norm (0: 1; negative: never).
   */
  double max_grad_norm;
  /**
   * LoRA+: the learning rate of B as a multiple of A's (0: 1).
   */
  double lora_plus_ratio;
  /**
   * Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: off).
   */
  double kl_weight;
  /**
   * Seed for the initial adapter, dropout and the row order.
   */
  uint64_t seed;
  /**
   * Bytes of private memory that the run may take (0: no limit).
   */
  uint64_t memory_budget;
  /**
   * Threads (0: as many as there are cores).
   */
  uint32_t threads;
  /**
   * 1 keeps activations in 32 bits, for comparison; by default products take them in 8 bits.
   */
  uint32_t exact;
  /**
   * 1 saves the adapter in 16 bits.
   */
  uint32_t half;
  /**
   * Must be 0.
   */
  uint32_t reserved;
  /**
   * Data whose training rows the model already knows, mixed into the batches. NULL for none.
   */
  const engraft_data *replay;
  /**
   * Number of rows to sample from the base instead, when the trainer is made; takes a while (0: none).
   */
  uint32_t replay_count;
  /**
   * Maximum tokens per sampled row (0: 64).
   */
  uint32_t replay_tokens;
  /**
   * Share of replayed rows, at most 0.9 (0: 0.1 if there is something to replay).
   */
  double replay_share;
  /**
   * Batches of rows to initialize A from when the trainer is made: A starts as the main directions of their inputs
   * (EVA) (0: A starts at random).
   */
  uint32_t eva_batches;
  /**
   * 1 reverses the divergence of `kl_weight` to KL(tuned‖base).
   */
  uint32_t kl_reverse;
} engraft_train_params;

/**
 * A plan's figures.
 */
typedef struct {
  /**
   * `sizeof(engraft_plan_info)`.
   */
  uint32_t struct_size;
  /**
   * 1 if it is within the budget, if any, and within what the machine leaves this process.
   */
  uint32_t fits;
  /**
   * Maximum bytes of private memory: the sum of the pools.
   */
  uint64_t private_bytes;
  /**
   * Mapped bytes of the model's file, not part of the private memory; the system may drop them.
   */
  uint64_t mapped_bytes;
  /**
   * The requested budget; 0 for none.
   */
  uint64_t budget_bytes;
  /**
   * Number of pools.
   */
  uint64_t pools;
} engraft_plan_info;

/**
 * How to make a session. Zero is the default for every field.
 */
typedef struct {
  /**
   * `sizeof(engraft_session_params)`.
   */
  uint32_t struct_size;
  /**
   * Tokens of the context (0: what the model was trained on, up to 4096).
   */
  uint32_t ctx_size;
  /**
   * `ENGRAFT_CACHE_*`.
   */
  uint32_t cache_type;
  /**
   * Threads (0: as many as there are cores). Give parallel sessions 1 each.
   */
  uint32_t threads;
  /**
   * 1 keeps activations in 32 bits.
   */
  uint32_t exact;
  /**
   * Must be 0.
   */
  uint32_t reserved;
} engraft_session_params;

/**
 * How to generate text. Zero is the default for every field; a negative `top_p` or `min_p` is off.
 */
typedef struct {
  /**
   * `sizeof(engraft_generate_params)`.
   */
  uint32_t struct_size;
  /**
   * Maximum tokens (0: 128; `UINT32_MAX`: until the model stops or the context is full).
   */
  uint32_t n_predict;
  /**
   * `ENGRAFT_PROMPT_*`.
   */
  uint32_t prompting;
  /**
   * 1 continues the session's chat or text, which must be of the same kind; 0 starts over.
   */
  uint32_t keep;
  /**
   * 1 always takes the most likely token; 0 does so without a `temp`, if the adapter's answers were judged so.
   */
  uint32_t greedy;
  /**
   * Draw from this many of the most likely tokens (0: 40; negative: all).
   */
  int32_t top_k;
  /**
   * Temperature (0: 0.8).
   */
  float temp;
  /**
   * Draw from the most likely tokens that together have this probability (0: 0.95).
   */
  float top_p;
  /**
   * Drop tokens below this share of the top token's probability (0: 0.05).
   */
  float min_p;
  /**
   * Make recent tokens less likely (0: 1, which is off).
   */
  float repeat_penalty;
  /**
   * Seed for the draws.
   */
  uint64_t seed;
  /**
   * The system message at the start of a chat (no effect when continuing one): UTF-8; NULL for the one that the
   * adapter was trained with, if there is one.
   */
  const char *system;
  /**
   * Bytes of `system`.
   */
  size_t system_length;
} engraft_generate_params;

/**
 * Receives the text as it is generated: UTF-8 in whole characters, not NUL-terminated. Returning false stops.
 * Called on the thread of the call that it was passed to.
 */
typedef bool (*engraft_token_callback)(const char *text, size_t length, void *user);

/**
 * Facts about what was generated.
 */
typedef struct {
  /**
   * `sizeof(engraft_generate_info)`.
   */
  uint32_t struct_size;
  /**
   * `ENGRAFT_ENDED_*`.
   */
  uint32_t ended;
  /**
   * Tokens of the prompt, including the template and the examples.
   */
  uint64_t prompt_tokens;
  /**
   * Generated tokens.
   */
  uint64_t tokens;
  /**
   * Seconds to read the prompt.
   */
  double prompt_seconds;
  /**
   * Seconds to generate.
   */
  double seconds;
  /**
   * The slot's generation when the last token was computed; 0 without a slot.
   */
  uint64_t generation;
} engraft_generate_info;

/**
 * How to open a store. Zero is the default for every field.
 */
typedef struct {
  /**
   * `sizeof(engraft_store_params)`.
   */
  uint32_t struct_size;
  /**
   * 1 refuses a folder that isn't a store instead of making it one.
   */
  uint32_t must_exist;
} engraft_store_params;

/**
 * Facts about a generation.
 */
typedef struct {
  /**
   * `sizeof(engraft_generation_info)`.
   */
  uint32_t struct_size;
  /**
   * `ENGRAFT_KIND_*`; 0 if nothing was ever promoted, and then all else is 0, too.
   */
  uint32_t kind;
  /**
   * Its number, from 1.
   */
  uint64_t number;
  /**
   * The generation that a rollback leads to; 0 for none.
   */
  uint64_t previous;
  /**
   * Bytes of its files.
   */
  uint64_t bytes;
  /**
   * How many damaged generations were passed over for this one; the log says why.
   */
  uint64_t passed_over;
  /**
   * Digest of the model that it is for.
   */
  uint8_t base_digest[32];
} engraft_generation_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The interface version that the library was built with; compare it with `ENGRAFT_ABI_VERSION`.
 */
uint32_t engraft_abi_version(void);

/**
 * Copies the library's version, such as "0.1.0"; see `engraft_message` for the buffer.
 */
int32_t engraft_version(char *buffer, size_t capacity, size_t *length);

/**
 * Sets all fields to their default. `struct_size` is `sizeof(engraft_adapter_params)`.
 */
int32_t engraft_adapter_default_params(engraft_adapter_params *params, size_t struct_size);

/**
 * Loads an adapter from its file, or from a folder that holds `adapter.engraft`, and checks it against the
 * model: base, shapes, and the results it gave when saved. `params` may be NULL. `*adapter` is freed with
 * `engraft_adapter_free`.
 */
int32_t engraft_adapter_load(const engraft_model *model,
                             const char *path,
                             size_t path_length,
                             const engraft_adapter_params *params,
                             engraft_adapter **adapter);

/**
 * Frees an adapter; sessions and slots that use it keep what they need. Does nothing for NULL.
 */
int32_t engraft_adapter_free(engraft_adapter *adapter);

/**
 * Gets facts about an adapter. Set `struct_size` first.
 */
int32_t engraft_adapter_get_info(const engraft_adapter *adapter, engraft_adapter_info *info);

/**
 * Commits an adapter as `adapter.engraft` in a folder, which is created if missing. A `half` of 1 stores it in
 * 16 bits. When this returns 0, the file is on disk, was read back, and only its owner can read it. `BUSY` if a
 * trainer has its checkpoints in the folder, or another call or process writes to it.
 */
int32_t engraft_adapter_save(const engraft_adapter *adapter,
                             const char *folder,
                             size_t folder_length,
                             uint32_t half);

/**
 * Makes an empty slot: sessions that follow it use the base alone. `*slot` is freed with `engraft_slot_free`.
 */
int32_t engraft_slot_create(engraft_slot **slot);

/**
 * Frees a slot; sessions that follow it keep what it held. Does nothing for NULL.
 */
int32_t engraft_slot_free(engraft_slot *slot);

/**
 * Puts an adapter, or with NULL the base alone, into a slot. Each session that follows the slot uses it from
 * its next token on. Never waits if adapter and slot share a model handle; otherwise it may read both model
 * files to compare their digests. `*generation` counts the swaps; it may be NULL. `BASE_MISMATCH` for an adapter
 * of another model.
 */
int32_t engraft_slot_swap(const engraft_slot *slot,
                          const engraft_adapter *adapter,
                          uint64_t *generation);

/**
 * Sets all fields to their default. `struct_size` is `sizeof(engraft_data_params)`.
 */
int32_t engraft_data_default_params(engraft_data_params *params, size_t struct_size);

/**
 * Reads rows from a file, or from a folder with `train.jsonl` and optionally `valid.jsonl` and `test.jsonl`.
 * `params` may be NULL. `*data` is freed with `engraft_data_free`. A gate reads the files again and refuses
 * them if they have changed, so leave them unchanged until it has run.
 */
int32_t engraft_data_open(const engraft_model *model,
                          const char *path,
                          size_t path_length,
                          const engraft_data_params *params,
                          engraft_data **data);

/**
 * Reads rows from memory: JSON, one object per line, as in such files. `valid` and `test` may be NULL; then a
 * share of `train` is split off for them. The library keeps a copy of everything. `params` may be NULL.
 * `*data` is freed with `engraft_data_free`.
 */
int32_t engraft_data_from_memory(const engraft_model *model,
                                 const uint8_t *train,
                                 size_t train_length,
                                 const uint8_t *valid,
                                 size_t valid_length,
                                 const uint8_t *test,
                                 size_t test_length,
                                 const engraft_data_params *params,
                                 engraft_data **data);

/**
 * Frees data, now or as soon as no trainer or gate uses it. Does nothing for NULL.
 */
int32_t engraft_data_free(engraft_data *data);

/**
 * Gets facts about the rows. Set `struct_size` first.
 */
int32_t engraft_data_get_info(const engraft_data *data, engraft_data_info *info);

/**
 * Copies the place of the `index`-th skipped row and why it was skipped, but never its text. Only the first
 * thousand of a part are known; a larger index is `MISUSE`. See `engraft_message` for the buffer.
 */
int32_t engraft_data_skipped(const engraft_data *data,
                             size_t index,
                             char *buffer,
                             size_t capacity,
                             size_t *length);

/**
 * Copies the message of the last failed call on a handle. With NULL, copies the message of this thread's last
 * failed call on any handle, or on none. Works on busy and poisoned handles, and changes no message.
 *
 * Every function that copies text writes at most `capacity` bytes into `buffer`, including a NUL, and puts the
 * length of the whole text, without the NUL, into `length` unless that is NULL. To get only the length, pass
 * NULL as `buffer` and 0 as `capacity`.
 */
int32_t engraft_message(const void *handle,
                        char *buffer,
                        size_t capacity,
                        size_t *length);

/**
 * The name of a code, such as "BUSY"; "UNKNOWN" for any other number. The text is static: never free it. It is
 * valid as long as the library is loaded.
 */
const char *engraft_code_name(int32_t code);

/**
 * Sets all fields to their default. `struct_size` is `sizeof(engraft_gate_params)`.
 */
int32_t engraft_gate_default_params(engraft_gate_params *params, size_t struct_size);

/**
 * Makes a gate for data without computing anything yet. `params` may be NULL. `*gate` is freed with
 * `engraft_gate_free`.
 */
int32_t engraft_gate_create(const engraft_model *model,
                            const engraft_data *data,
                            const engraft_gate_params *params,
                            engraft_gate **gate);

/**
 * Frees a gate and what it kept. `BUSY` while a call runs on it. Does nothing for NULL.
 */
int32_t engraft_gate_free(engraft_gate *gate);

/**
 * Trains and measures all arms and judges them; returns 0 whatever the verdict. `callback` may be NULL; if it
 * returns false, the call ends with `CANCELLED` and nothing is judged. An earlier verdict is gone as soon as this
 * begins. `BAD_DATA` if the data's files have changed since they were opened.
 */
int32_t engraft_gate_run(const engraft_gate *gate,
                         engraft_progress_callback callback,
                         void *user);

/**
 * Puts the decision (`ENGRAFT_DECISION_*`) into `*decision` and copies the name of its arm, which may be empty;
 * see `engraft_message` for the buffer.
 */
int32_t engraft_gate_decision(const engraft_gate *gate,
                              uint32_t *decision,
                              char *buffer,
                              size_t capacity,
                              size_t *length);

/**
 * Copies the verdict as JSON, with its reasons and figures; see `engraft_message` for the buffer.
 */
int32_t engraft_gate_verdict(const engraft_gate *gate, char *buffer, size_t capacity, size_t *length);

/**
 * Copies the report as a single HTML page with sample rows and answers; see `engraft_message` for the buffer.
 * Without JavaScript, the page shows the verdict alone.
 */
int32_t engraft_gate_report(const engraft_gate *gate, char *buffer, size_t capacity, size_t *length);

/**
 * Copies what the verdict chose: an adapter or examples. `GATE_REFUSED` if what is there stays. `*adapter` is
 * freed with `engraft_adapter_free`.
 */
int32_t engraft_gate_adapter(const engraft_gate *gate, engraft_adapter **adapter);

/**
 * Ends the running call, and later ones, with `CANCELLED` until `engraft_gate_resume`. May be called from
 * anywhere, at any time.
 */
int32_t engraft_gate_cancel(const engraft_gate *gate);

/**
 * Makes the running call wait until `engraft_gate_resume` or `engraft_gate_cancel`. May be called from anywhere,
 * at any time.
 */
int32_t engraft_gate_pause(const engraft_gate *gate);

/**
 * Undoes a pause or a cancellation. May be called from anywhere, at any time.
 */
int32_t engraft_gate_resume(const engraft_gate *gate);

/**
 * Sets how hot the device is (`ENGRAFT_THERMAL_*`), so that the comparison rests accordingly. May be called from
 * anywhere, at any time.
 */
int32_t engraft_gate_set_thermal(const engraft_gate *gate,
                                 int32_t thermal);

/**
 * Passes all lines up to `level` to `callback`, which replaces the previous one; NULL ends logging. When this
 * returns, the previous callback isn't running and never will again (except for a call that this one is made
 * from). `BUSY` if the program already has a logger for Rust code, which then gets the library's lines.
 */
int32_t engraft_log_set(engraft_log_callback callback, void *user, int32_t level);

/**
 * Sets all fields to their default. `struct_size` is `sizeof(engraft_model_params)`.
 */
int32_t engraft_model_default_params(engraft_model_params *params, size_t struct_size);

/**
 * Opens and checks the model file at `path` (UTF-8). `params` may be NULL. `*model` is freed with
 * `engraft_model_free`.
 */
int32_t engraft_model_open(const char *path,
                           size_t path_length,
                           const engraft_model_params *params,
                           engraft_model **model);

/**
 * Frees a model, now or as soon as nothing made from it is left. Does nothing for NULL.
 */
int32_t engraft_model_free(engraft_model *model);

/**
 * Gets facts about a model. Set `struct_size` first.
 */
int32_t engraft_model_get_info(const engraft_model *model, engraft_model_info *info);

/**
 * Copies the name in the model's file (`general.name`), which may be empty; see `engraft_message` for the buffer.
 */
int32_t engraft_model_name(const engraft_model *model,
                           char *buffer,
                           size_t capacity,
                           size_t *length);

/**
 * Puts the 32 bytes that identify the model to adapters into `digest`. The first call reads the whole file
 * unless a digest cache knows it.
 */
int32_t engraft_model_digest(const engraft_model *model, uint8_t *digest);

/**
 * Frees memory that can be rebuilt: the tokenizer, unless it is in use. Call it when the system warns of low
 * memory.
 */
int32_t engraft_model_trim(const engraft_model *model);

/**
 * Sets all fields to their default. `struct_size` is `sizeof(engraft_train_params)`.
 */
int32_t engraft_train_default_params(engraft_train_params *params, size_t struct_size);

/**
 * Plans a run. Returns 0 even if the run doesn't fit; the plan says so. If `data` is NULL, rows are assumed to
 * have the default maximum length. `params` may be NULL. `*plan` is freed with `engraft_plan_free`.
 */
int32_t engraft_plan_create(const engraft_model *model,
                            const engraft_data *data,
                            const engraft_train_params *params,
                            engraft_plan **plan);

/**
 * Frees a plan. Does nothing for NULL.
 */
int32_t engraft_plan_free(engraft_plan *plan);

/**
 * Gets a plan's figures. Set `struct_size` first.
 */
int32_t engraft_plan_get_info(const engraft_plan *plan, engraft_plan_info *info);

/**
 * Copies the name of the `index`-th pool and puts its size into `*bytes` unless that is NULL; see
 * `engraft_message` for the buffer.
 */
int32_t engraft_plan_pool(const engraft_plan *plan,
                          size_t index,
                          char *buffer,
                          size_t capacity,
                          size_t *length,
                          uint64_t *bytes);

/**
 * Copies why a plan doesn't fit and what would; an empty text if it fits. See `engraft_message` for the buffer.
 */
int32_t engraft_plan_advice(const engraft_plan *plan,
                            char *buffer,
                            size_t capacity,
                            size_t *length);

/**
 * Puts the bytes that a session with these settings, and adapters up to `rank`, will take into `*bytes`: its
 * cache and buffers. Each model adds its tokenizer once. `params` may be NULL. `MISUSE` for a rank above 4096; an
 * adapter has at most 256, but several can be stacked.
 */
int32_t engraft_session_bytes(const engraft_model *model,
                              const engraft_session_params *params,
                              uint32_t rank,
                              uint64_t *bytes);

/**
 * Sets all fields to their default. `struct_size` is `sizeof(engraft_session_params)`.
 */
int32_t engraft_session_default_params(engraft_session_params *params, size_t struct_size);

/**
 * Sets all fields to their default. `struct_size` is `sizeof(engraft_generate_params)`.
 */
int32_t engraft_generate_default_params(engraft_generate_params *params, size_t struct_size);

/**
 * Makes a session on a model, with an adapter or, for NULL, with the base alone. `params` may be NULL.
 * `*session` is freed with `engraft_session_free`. `BASE_MISMATCH` for an adapter of another model. An adapter of
 * another model handle is accepted if the digests of both files are equal.
 */
int32_t engraft_session_create(const engraft_model *model,
                               const engraft_adapter *adapter,
                               const engraft_session_params *params,
                               engraft_session **session);

/**
 * Frees a session and ends its threads. `BUSY` while a call runs on it. Does nothing for NULL.
 */
int32_t engraft_session_free(engraft_session *session);

/**
 * Uses an adapter, or with NULL the base alone, from the next token on, and no longer follows a slot. What the
 * session has already read stays as computed. `BASE_MISMATCH` for an adapter of another model.
 */
int32_t engraft_session_set_adapter(const engraft_session *session,
                                    const engraft_adapter *adapter);

/**
 * Takes the adapter from a slot from now on, checking the slot before every token; see `engraft_slot_swap`.
 * `BASE_MISMATCH` for a slot of another model.
 */
int32_t engraft_session_follow(const engraft_session *session, const engraft_slot *slot);

/**
 * Continues a prompt (UTF-8), or answers it as a chat, and passes the text to `callback` as it is generated.
 * `params`, `callback` and `info` may be NULL; set the `struct_size` of `info` first. Returns `CANCELLED` if the
 * callback returns false or `engraft_session_cancel` was called; `info` is filled then, too. If stopped before
 * the first token, the session continues as if nothing had been asked, but with `keep` 0 it has forgotten what
 * came before. `DOES_NOT_FIT` if the system hasn't enough memory for the cache.
 */
int32_t engraft_session_generate(const engraft_session *session,
                                 const char *prompt,
                                 size_t prompt_length,
                                 const engraft_generate_params *params,
                                 engraft_token_callback callback,
                                 void *user,
                                 engraft_generate_info *info);

/**
 * Stops the running call before its next token, if there is one. May be called from anywhere, at any time.
 */
int32_t engraft_session_cancel(const engraft_session *session);

/**
 * Forgets everything that was read and generated.
 */
int32_t engraft_session_reset(const engraft_session *session);

/**
 * Frees the memory of the cache and the buffers and forgets what was read and generated; the next call
 * allocates them again. Call it when the system warns of low memory.
 */
int32_t engraft_session_trim(const engraft_session *session);

/**
 * Sets all fields to their default. `struct_size` is `sizeof(engraft_store_params)`.
 */
int32_t engraft_store_default_params(engraft_store_params *params, size_t struct_size);

/**
 * Opens the store in a folder. A missing folder is created, accessible only to its owner. `params` may be NULL.
 * `*store` is freed with `engraft_store_free`.
 */
int32_t engraft_store_open(const char *folder,
                           size_t folder_length,
                           const engraft_store_params *params,
                           engraft_store **store);

/**
 * Frees a store; the folder stays as it is. Does nothing for NULL.
 */
int32_t engraft_store_free(engraft_store *store);

/**
 * Makes the winner of a gate's verdict the active generation and puts its number into `*generation`, which may
 * be NULL. `GATE_REFUSED` if the base alone stays; nothing changes then. When this returns 0, everything is on
 * disk and was read back.
 */
int32_t engraft_store_promote(const engraft_store *store,
                              const engraft_gate *gate,
                              uint64_t *generation);

/**
 * Makes an adapter the active generation on the caller's judgement, without the gate. `verdict` is stored with
 * it unchanged: say why. `*generation` may be NULL.
 */
int32_t engraft_store_promote_adapter(const engraft_store *store,
                                      const engraft_adapter *adapter,
                                      const char *verdict,
                                      size_t verdict_length,
                                      uint64_t *generation);

/**
 * Gets facts about the active generation and verifies its files. Set `struct_size` first.
 */
int32_t engraft_store_active(const engraft_store *store, engraft_generation_info *info);

/**
 * Loads the active generation and checks it against the model: an adapter, examples, or the base alone (also if
 * nothing was ever promoted). `params` may be NULL. `*adapter` is freed with `engraft_adapter_free`.
 */
int32_t engraft_store_load(const engraft_store *store,
                           const engraft_model *model,
                           const engraft_adapter_params *params,
                           engraft_adapter **adapter);

/**
 * Makes the previously active generation active again and puts its number into `*generation`, which may be
 * NULL. `MISUSE` if there is none.
 */
int32_t engraft_store_rollback(const engraft_store *store, uint64_t *generation);

/**
 * Makes a generation active after verifying it.
 */
int32_t engraft_store_activate(const engraft_store *store, uint64_t generation);

/**
 * Removes all generations except the newest `keep` good ones, the active one, and the one that a rollback leads
 * to. Puts the number of removed ones into `*removed`, which may be NULL. `MISUSE` for a `keep` of 0.
 */
int32_t engraft_store_prune(const engraft_store *store,
                            size_t keep,
                            uint64_t *removed);

/**
 * Copies a list of all generations as JSON: `{"active":2,"generations":[{"number":1,"kind":"adapter",…}]}`;
 * see `engraft_message` for the buffer.
 */
int32_t engraft_store_list(const engraft_store *store, char *buffer, size_t capacity, size_t *length);

/**
 * Makes a trainer. Plans first, and returns `DOES_NOT_FIT` if the plan exceeds the budget, before allocating
 * anything large. Then allocates all memory for training. `params` may be NULL. `*trainer` is freed with
 * `engraft_trainer_free`.
 */
int32_t engraft_trainer_create(const engraft_model *model,
                               const engraft_data *data,
                               const engraft_train_params *params,
                               engraft_trainer **trainer);

/**
 * Frees a trainer and ends its threads. `BUSY` while a call runs on it. Does nothing for NULL.
 */
int32_t engraft_trainer_free(engraft_trainer *trainer);

/**
 * Takes one step. `progress` may be NULL; otherwise set its `struct_size` first. `MISUSE` once all steps are
 * done. If a step is skipped because its loss isn't finite, or the run returns to its checkpoint (see
 * `engraft_trainer_checkpoint`), the `event` of `progress` is `ENGRAFT_EVENT_NOTE`, `step` stays or falls, and
 * the log says why.
 */
int32_t engraft_trainer_step(const engraft_trainer *trainer,
                             engraft_progress *progress);

/**
 * Takes this many steps, or with 0 all that are left. `callback` may be NULL; it is called after each step, and
 * if it returns false, the call ends with `CANCELLED`. What was trained stays, and another call continues. If
 * the run returns to its checkpoint, `step` falls, a note says so, and the steps are repeated.
 */
int32_t engraft_trainer_run(const engraft_trainer *trainer,
                            uint64_t steps,
                            engraft_progress_callback callback,
                            void *user);

/**
 * Puts the loss on the validation rows into `*loss`: the base's before the first step, with the adapter
 * afterwards. `BAD_DATA` if there are no such rows.
 */
int32_t engraft_trainer_evaluate(const engraft_trainer *trainer, double *loss);

/**
 * Gets the progress of a run. Set `struct_size` first. `BUSY` during a call, when the callback gets it instead.
 */
int32_t engraft_trainer_progress(const engraft_trainer *trainer,
                                 engraft_progress *progress);

/**
 * Commits the current adapter as `adapter.engraft` in a folder, which is created if missing. When this returns
 * 0, the file is on disk, was read back, and only its owner can read it. `BUSY` if another trainer has its
 * checkpoints in the folder, or another call or process writes to it.
 */
int32_t engraft_trainer_save(const engraft_trainer *trainer,
                             const char *folder,
                             size_t folder_length);

/**
 * Commits everything that the run needs to continue, and the adapter as `engraft_trainer_save` does, to a
 * folder, which is created if missing. When this returns 0, both are on disk and were read back. From then on the
 * folder belongs to this trainer, until the trainer is freed or uses another one. All other writers to it get
 * `BUSY`, even other trainers and `engraft_adapter_save` in this process; so does this call if there is such a
 * writer already. The two newest checkpoints are kept; those of another run are replaced.
 *
 * A run diverges after three steps in a row without a finite loss, or when its loss grows without end. It then
 * returns to its last checkpoint at half the learning rate, and a note says so. After three returns, or without
 * a checkpoint, its steps return `NONFINITE`.
 */
int32_t engraft_trainer_checkpoint(const engraft_trainer *trainer,
                                   const char *folder,
                                   size_t folder_length);

/**
 * Continues from the newest good checkpoint in a folder, with the same result as if the run had never stopped.
 * The trainer must have taken no step, and must be made with the run's model, rows and settings; `BASE_MISMATCH`
 * or `MISUSE` names a difference. `IO` if there is no checkpoint, `CORRUPT` if none is good; the trainer is
 * unchanged then.
 */
int32_t engraft_trainer_restore(const engraft_trainer *trainer,
                                const char *folder,
                                size_t folder_length);

/**
 * Copies the current adapter, for sessions, slots and stores. `*adapter` is freed with `engraft_adapter_free`.
 */
int32_t engraft_trainer_adapter(const engraft_trainer *trainer,
                                engraft_adapter **adapter);

/**
 * Ends the running call, and later ones, with `CANCELLED` before their next step, until
 * `engraft_trainer_resume`. Saving still works. May be called from anywhere, at any time.
 */
int32_t engraft_trainer_cancel(const engraft_trainer *trainer);

/**
 * Makes the running call, and later ones, wait before their next step, until `engraft_trainer_resume` or
 * `engraft_trainer_cancel`. May be called from anywhere, at any time.
 */
int32_t engraft_trainer_pause(const engraft_trainer *trainer);

/**
 * Undoes a pause or a cancellation. May be called from anywhere, at any time.
 */
int32_t engraft_trainer_resume(const engraft_trainer *trainer);

/**
 * Sets how hot the device is (`ENGRAFT_THERMAL_*`), so that training rests accordingly. May be called from
 * anywhere, at any time.
 */
int32_t engraft_trainer_set_thermal(const engraft_trainer *trainer, int32_t thermal);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ENGRAFT_H */
