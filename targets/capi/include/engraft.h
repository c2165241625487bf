/*
 * Engraft: adapts a quantized small language model (GGUF) on the device that uses it.
 *
 * - Every function returns a code: 0, or a negative one of ENGRAFT_*; engraft_message tells more.
 * - Handles are made by functions with a last parameter of type T **, and freed by the matching _free. They
 *   are numbers, not addresses: one that was freed is refused with ENGRAFT_MISUSE. NULL may always be freed.
 * - Texts are a pointer and a length in bytes, UTF-8.
 * - Structs begin with struct_size. The functions *_default_params(&params, sizeof params) set it, and all
 *   else to zero, which is the default of everything. They only grow at the end.
 * - Trainers, gates and sessions serve one call at a time, and others get ENGRAFT_BUSY; all other handles may
 *   be shared by threads. What steers a call that runs may be called from anywhere: cancel, pause, resume and
 *   set_thermal.
 * - Callbacks take void *user last, are called without a lock held, and must not unwind (throw, longjmp).
 *
 * Made of targets/capi/src by cbindgen: change that.
 */

#ifndef ENGRAFT_H
#define ENGRAFT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * Version of this interface: its major part in the upper half, its minor part in the lower. Programs work
 * with libraries of the same major part whose minor part is not lower.
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
 * Nothing: the base alone.
 */
#define ENGRAFT_KIND_BASE 3

/**
 * The device is cool: work at full speed. As `ProcessInfo.ThermalState.nominal`.
 */
#define ENGRAFT_THERMAL_NOMINAL 0

/**
 * It is warm: a tenth of the time is spent resting.
 */
#define ENGRAFT_THERMAL_FAIR 1

/**
 * It is hot: half of the time is spent resting.
 */
#define ENGRAFT_THERMAL_SERIOUS 2

/**
 * It is too hot: work waits until this changes.
 */
#define ENGRAFT_THERMAL_CRITICAL 3

/**
 * Rows are not of a known task.
 */
#define ENGRAFT_TASK_NONE 0

/**
 * GSM8K: answers behind `####`.
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
 * All is well.
 */
#define ENGRAFT_OK 0

/**
 * Reading or writing failed in the operating system.
 */
#define ENGRAFT_IO -1

/**
 * The disk, or a quota, is full.
 */
#define ENGRAFT_FULL -2

/**
 * The system gave no memory.
 */
#define ENGRAFT_NOMEM -3

/**
 * A file is not what its format demands: cut, flipped bits, foreign.
 */
#define ENGRAFT_CORRUPT -4

/**
 * An argument is out of range, contradicts another, or is no live handle.
 */
#define ENGRAFT_MISUSE -5

/**
 * Another call runs on the handle, or another writer holds the folder or the store.
 */
#define ENGRAFT_BUSY -6

/**
 * The caller asked to stop.
 */
#define ENGRAFT_CANCELLED -7

/**
 * A struct holds what this version of the library does not know.
 */
#define ENGRAFT_UNSUPPORTED_VERSION -8

/**
 * An adapter and a model do not belong together.
 */
#define ENGRAFT_BASE_MISMATCH -9

/**
 * A NaN or infinity appeared where none may be.
 */
#define ENGRAFT_NONFINITE -10

/**
 * The memory plan exceeds the budget; the message names what would fit.
 */
#define ENGRAFT_DOES_NOT_FIT -11

/**
 * The gate did not promote.
 */
#define ENGRAFT_GATE_REFUSED -12

/**
 * A defect of the library: the handle can only be freed.
 */
#define ENGRAFT_PANIC -13

/**
 * Data is malformed, or leaves nothing to train on.
 */
#define ENGRAFT_BAD_DATA -14

/**
 * The file is right, but this version can't handle what it holds.
 */
#define ENGRAFT_UNSUPPORTED -15

/**
 * The caller's buffer is too small; it holds the beginning, and the length says how much there is.
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
 * Answers are not compared, beyond what the data's task says.
 */
#define ENGRAFT_METRIC_NONE 0

/**
 * Answers are compared word for word, white space aside.
 */
#define ENGRAFT_METRIC_EXACT 1

/**
 * Answers are compared as JSON, all fields equal.
 */
#define ENGRAFT_METRIC_JSON 2

/**
 * Nothing was judged yet.
 */
#define ENGRAFT_DECISION_NONE 0

/**
 * A trained arm is to be promoted.
 */
#define ENGRAFT_DECISION_PROMOTE 1

/**
 * Examples in the prompt do as well without training.
 */
#define ENGRAFT_DECISION_KEEP_PROMPTING 2

/**
 * The base alone stays.
 */
#define ENGRAFT_DECISION_KEEP_BASE 3

/**
 * Nothing.
 */
#define ENGRAFT_LOG_NONE 0

/**
 * What went wrong.
 */
#define ENGRAFT_LOG_ERROR 1

/**
 * What a user should hear of.
 */
#define ENGRAFT_LOG_WARN 2

/**
 * What was chosen.
 */
#define ENGRAFT_LOG_INFO 3

/**
 * What helps to find a defect.
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
 * The MLP's gate.
 */
#define ENGRAFT_MODULE_GATE 16

/**
 * The MLP's way up.
 */
#define ENGRAFT_MODULE_UP 32

/**
 * The MLP's way down.
 */
#define ENGRAFT_MODULE_DOWN 64

/**
 * The learning rate falls linearly to zero.
 */
#define ENGRAFT_SCHEDULE_LINEAR 0

/**
 * It falls to zero as half a cosine.
 */
#define ENGRAFT_SCHEDULE_COSINE 1

/**
 * It stays.
 */
#define ENGRAFT_SCHEDULE_CONSTANT 2

/**
 * A step is done: `step`, `loss` and what follows are of it.
 */
#define ENGRAFT_EVENT_STEP 0

/**
 * The rows to validate with were looked at: `valid_loss` is their loss. Of gates alone.
 */
#define ENGRAFT_EVENT_VALIDATION 1

/**
 * The call is paused, or it is too hot: it waits once this event's callback has returned.
 */
#define ENGRAFT_EVENT_HELD 2

/**
 * `text` is something to tell.
 */
#define ENGRAFT_EVENT_NOTE 3

/**
 * Keys and values take 2 bytes an element.
 */
#define ENGRAFT_CACHE_F16 0

/**
 * 4 bytes, exact.
 */
#define ENGRAFT_CACHE_F32 1

/**
 * 8 bits in blocks of 32.
 */
#define ENGRAFT_CACHE_Q8 2

/**
 * The model ended its text.
 */
#define ENGRAFT_ENDED_MODEL 0

/**
 * As many tokens as were asked for.
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
 * What is put beside a model. Never changes; may be used by any number of threads and sessions at once.
 */
typedef struct engraft_adapter engraft_adapter;

/**
 * Rows to train on and to validate with. Never changes; may be used by any number of threads at once.
 */
typedef struct engraft_data engraft_data;

/**
 * A comparison of arms, with its verdict. One call at a time; what steers it may be called from anywhere.
 */
typedef struct engraft_gate engraft_gate;

/**
 * A model. Opened by `engraft_model_open`; may be used by any number of threads at once.
 */
typedef struct engraft_model engraft_model;

/**
 * A memory plan. Never changes; may be used by any number of threads at once.
 */
typedef struct engraft_plan engraft_plan;

/**
 * A sequence with its cache. One call at a time; `engraft_session_cancel` from anywhere.
 */
typedef struct engraft_session engraft_session;

/**
 * A place that sessions take their adapter from. `engraft_slot_swap` may be called at any time, from any
 * thread. It is for one model, which it keeps: that of the first adapter put into it, or of the first session
 * that follows it.
 */
typedef struct engraft_slot engraft_slot;

/**
 * A folder of generations. May be used by any number of threads at once; of those that change it, in this
 * and all other processes, one at a time, and others get `BUSY`.
 */
typedef struct engraft_store engraft_store;

/**
 * A run of training. One call at a time; what steers it may be called from anywhere.
 */
typedef struct engraft_trainer engraft_trainer;

/**
 * How an adapter is loaded. Zero is the default of everything.
 */
typedef struct {
  /**
   * `sizeof(engraft_adapter_params)`.
   */
  uint32_t struct_size;
  /**
   * 1 takes an adapter of another base, if its shapes are this one's. It can't be saved or promoted then.
   */
  uint32_t force_base;
  /**
   * What its effect is multiplied by (0: 1, as trained). At any other it can't be saved or promoted.
   */
  float scale;
  /**
   * Threads for loading it (0: as many as there are cores).
   */
  uint32_t threads;
} engraft_adapter_params;

/**
 * What an adapter is.
 */
typedef struct {
  /**
   * `sizeof(engraft_adapter_info)`.
   */
  uint32_t struct_size;
  /**
   * `ENGRAFT_KIND_ADAPTER`, `ENGRAFT_KIND_FEW_SHOT` or `ENGRAFT_KIND_BASE`; of the last two all else is 0.
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
   * Tokens that the loss was taken on.
   */
  uint64_t tokens;
  /**
   * Held-out loss of the base in nats per token; NaN where unknown.
   */
  float valid_loss_before;
  /**
   * Held-out loss with the adapter; NaN where unknown.
   */
  float valid_loss_after;
} engraft_adapter_info;

/**
 * How rows are read. Zero is the default of everything.
 */
typedef struct {
  /**
   * `sizeof(engraft_data_params)`.
   */
  uint32_t struct_size;
  /**
   * Tokens of a row at most; longer ones are cut (0: 256). Never more than the model was trained for.
   */
  uint32_t max_seq_length;
  /**
   * 1 trains on every token, instead of on answers only.
   */
  uint32_t no_mask_prompt;
  /**
   * 1 joins prompt and completion as they are, even for a model with a chat template.
   */
  uint32_t raw;
  /**
   * `ENGRAFT_TASK_*`: how rows are asked and answers are read.
   */
  uint32_t task;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * Share of the rows that is held back, where no rows are given for that (0: 0.1; below 0: none).
   */
  double valid_fraction;
  /**
   * Seed of that choice.
   */
  uint64_t split_seed;
} engraft_data_params;

/**
 * What rows there are.
 */
typedef struct {
  /**
   * `sizeof(engraft_data_info)`.
   */
  uint32_t struct_size;
  /**
   * 1 where the rows to validate with were split off by seed.
   */
  uint32_t split_by_seed;
  /**
   * Rows to train on.
   */
  uint64_t train_rows;
  /**
   * Tokens in them that the loss is taken on.
   */
  uint64_t train_tokens;
  /**
   * Rows to validate with.
   */
  uint64_t valid_rows;
  /**
   * Tokens in them that the loss is taken on.
   */
  uint64_t valid_tokens;
  /**
   * Rows that were left out; `engraft_data_skipped` names them.
   */
  uint64_t skipped;
  /**
   * Rows that were cut.
   */
  uint64_t truncated;
  /**
   * Rows to validate with that are among those to train on: they flatter the result.
   */
  uint64_t duplicates;
  /**
   * Positions of the longest row.
   */
  uint64_t rows_max;
} engraft_data_info;

/**
 * What is compared. Zero is the default of everything.
 */
typedef struct {
  /**
   * `sizeof(engraft_gate_params)`.
   */
  uint32_t struct_size;
  /**
   * `ENGRAFT_ARM_*` beside the base alone (0: all). Without few-shot, training need not beat it.
   */
  uint32_t arms;
  /**
   * Examples in a few-shot prompt, at most 64 (0: 5).
   */
  uint32_t shots;
  /**
   * Steps of each trained arm (0: 300).
   */
  uint32_t steps;
  /**
   * Sequences of a step (0: 1).
   */
  uint32_t batch_size;
  /**
   * Rank of the adapters (0: the largest that memory and rows allow, up to 16).
   */
  uint32_t rank;
  /**
   * `ENGRAFT_METRIC_*`; data of a task is compared as the task says.
   */
  uint32_t metric;
  /**
   * Tokens of an answer at most, up to 65536 (0: 256).
   */
  uint32_t answer_tokens;
  /**
   * Training rows at most (0: all).
   */
  uint32_t train_rows;
  /**
   * Held-out rows at most (0: all).
   */
  uint32_t held_out_rows;
  /**
   * Held-out rows below which nothing is decided (0: 20).
   */
  uint32_t examples_min;
  /**
   * Bootstrap resamples (0: 10000).
   */
  uint32_t resamples;
  /**
   * Looks at the validation rows in a run (0: 10).
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
   * 1 lets a lower loss alone win, where answers are compared.
   */
  uint32_t loss_alone;
  /**
   * 1 leaves out the text that is built in, which training must not harm. Then name one of your own.
   */
  uint32_t no_built_in_retention;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * Minutes to train, shared by the trained arms, instead of steps (0: steps count).
   */
  double minutes;
  /**
   * Learning rate at its highest (0: found by a range test).
   */
  double learning_rate;
  /**
   * Two-sided level of the intervals and tests (0: 0.05).
   */
  double level;
  /**
   * Seed of adapters, examples and the bootstrap.
   */
  uint64_t seed;
  /**
   * Bytes of private memory that training and scoring may take (0: what the machine leaves this process).
   */
  uint64_t memory_budget;
  /**
   * A text that training must not harm, beside the one that is built in: UTF-8, in passages behind lines that
   * begin with `%% `, or as one. The library keeps a copy. NULL for none.
   */
  const char *retention;
  /**
   * Bytes of `retention`.
   */
  size_t retention_length;
  /**
   * Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: none); half as much time again.
   */
  double kl_weight;
  /**
   * Rows that the model knew, mixed into every batch: those to train on of this data. NULL for none.
   */
  const engraft_data *replay;
  /**
   * Rows to sample from the base for that (0: none).
   */
  uint32_t replay_count;
  /**
   * Tokens to sample for each of them at most (0: 64).
   */
  uint32_t replay_tokens;
  /**
   * Share of the rows that is replayed, at most 0.9 (0: 0.1 where there is something to replay).
   */
  double replay_share;
  /**
   * Rows whose answers training must not harm, beside retention texts: all of this data. NULL for none.
   */
  const engraft_data *retention_rows;
  /**
   * A folder for what is unfinished, in UTF-8, made if it is missing: the same comparison goes on from there after
   * the process has ended, and a run that diverges goes back. NULL for none. The library keeps a copy.
   */
  const char *unfinished;
  /**
   * Bytes of `unfinished`.
   */
  size_t unfinished_length;
} engraft_gate_params;

/**
 * How far a run is.
 */
typedef struct {
  /**
   * Bytes of this struct as the library knows it.
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
   * Mean loss of the last step, in nats per token; NaN before it.
   */
  double loss;
  /**
   * Loss on the rows to validate with, when they were looked at last; NaN before.
   */
  double valid_loss;
  /**
   * Learning rate of the last step.
   */
  double learning_rate;
  /**
   * Norm of its gradient, before it was scaled down.
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
   * The gate's arm, or what a note says: UTF-8 that no NUL ends, valid during the callback. NULL for none.
   */
  const char *text;
  /**
   * Bytes of `text`.
   */
  size_t text_length;
} engraft_progress;

/**
 * Is told of progress; false cancels. Called on the thread of the call that it was given to.
 */
typedef bool (*engraft_progress_callback)(const engraft_progress *progress, void *user);

/**
 * Takes a line: its level, and its text, which no NUL ends. Called from any thread, and from several at
 * once; it must not wait for another thread that calls `engraft_log_set`.
 */
typedef void (*engraft_log_callback)(int32_t level, const char *text, size_t length, void *user);

/**
 * How a model is opened. Zero is the default of everything.
 */
typedef struct {
  /**
   * `sizeof(engraft_model_params)`.
   */
  uint32_t struct_size;
  /**
   * 1 reads the file into private memory instead of mapping it: where it may be cut short meanwhile,
   * which ends a process that has mapped it.
   */
  uint32_t no_mmap;
  /**
   * A folder for digests of model files, so that each file is read whole only once: UTF-8. NULL for none.
   */
  const char *digest_cache;
  /**
   * Bytes of `digest_cache`.
   */
  size_t digest_cache_length;
} engraft_model_params;

/**
 * What a model is.
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
   * Positions that it was trained for.
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
   * Bytes of private memory that the tokenizer takes once it is needed.
   */
  uint64_t tokenizer_bytes;
} engraft_model_info;

/**
 * How an adapter is trained. Zero is the default of everything.
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
   * Alpha: the adapter's effect is multiplied by alpha/rank (0: twice the rank).
   */
  float alpha;
  /**
   * Share of the adapter's inputs that is set to zero while training, below 1.
   */
  float dropout;
  /**
   * `ENGRAFT_MODULE_*`: what is adapted (0: all seven).
   */
  uint32_t modules;
  /**
   * How many of the last blocks are adapted (0: all).
   */
  uint32_t num_layers;
  /**
   * 1 for DoRA.
   */
  uint32_t dora;
  /**
   * 1 multiplies by alpha/sqrt(rank) instead.
   */
  uint32_t rslora;
  /**
   * Sequences of a batch (0: 1).
   */
  uint32_t batch_size;
  /**
   * Batches whose gradients are summed before a step (0: 1).
   */
  uint32_t grad_accumulation_steps;
  /**
   * `ENGRAFT_SCHEDULE_*`.
   */
  uint32_t schedule;
  /**
   * Steps in which the learning rate rises from zero.
   */
  uint32_t warmup_steps;
  /**
   * Optimizer steps of the whole run (0: 300).
   */
  uint64_t steps;
  /**
   * Learning rate at its highest (0: 2e-4).
   */
  double learning_rate;
  /**
   * AdamW's decoupled weight decay.
   */
  double weight_decay;
  /**
   * Gradients are scaled down to this norm (0: 1; below 0: never).
   */
  double max_grad_norm;
  /**
   * LoRA+: the learning rate of B as a multiple of A's (0: 1).
   */
  double lora_plus_ratio;
  /**
   * Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: none).
   */
  double kl_weight;
  /**
   * Seed of the initial adapter, of dropout, and of the order of rows.
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
   * 1 keeps activations in 32 bits, for comparison; by default they take 8 in products.
   */
  uint32_t exact;
  /**
   * 1 saves the adapter in 16 bits.
   */
  uint32_t half;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * Rows that the model knew, mixed into every batch: those to train on of this data. NULL for none.
   */
  const engraft_data *replay;
  /**
   * Rows to sample from the base for that when the trainer is made, which takes a while (0: none).
   */
  uint32_t replay_count;
  /**
   * Tokens to sample for each of them at most (0: 64).
   */
  uint32_t replay_tokens;
  /**
   * Share of the rows that is replayed, at most 0.9 (0: 0.1 where there is something to replay).
   */
  double replay_share;
  /**
   * Batches of rows whose inputs' main directions A begins as (EVA), looked at when the trainer is made (0: A begins
   * at random).
   */
  uint32_t eva_batches;
  /**
   * 1 takes the divergence of `kl_weight` the other way: KL(tuned‖base).
   */
  uint32_t kl_reverse;
} engraft_train_params;

/**
 * What a plan says.
 */
typedef struct {
  /**
   * `sizeof(engraft_plan_info)`.
   */
  uint32_t struct_size;
  /**
   * 1 where it is within the budget, if there is one, and within what the machine leaves this process.
   */
  uint32_t fits;
  /**
   * Bytes of private memory at most: the sum of the pools.
   */
  uint64_t private_bytes;
  /**
   * Bytes of the model's file that are mapped beside them, which the system may drop.
   */
  uint64_t mapped_bytes;
  /**
   * The budget that was asked about; 0 for none.
   */
  uint64_t budget_bytes;
  /**
   * Pools.
   */
  uint64_t pools;
} engraft_plan_info;

/**
 * How a session is made. Zero is the default of everything.
 */
typedef struct {
  /**
   * `sizeof(engraft_session_params)`.
   */
  uint32_t struct_size;
  /**
   * Tokens of the context (0: what the model was trained for, at most 4096).
   */
  uint32_t ctx_size;
  /**
   * `ENGRAFT_CACHE_*`.
   */
  uint32_t cache_type;
  /**
   * Threads (0: as many as there are cores). Sessions that run side by side take 1 each.
   */
  uint32_t threads;
  /**
   * 1 keeps activations in 32 bits.
   */
  uint32_t exact;
  /**
   * 0.
   */
  uint32_t reserved;
} engraft_session_params;

/**
 * How text is generated. Zero is the default of everything; a `top_p` or `min_p` below zero is off.
 */
typedef struct {
  /**
   * `sizeof(engraft_generate_params)`.
   */
  uint32_t struct_size;
  /**
   * Tokens at most (0: 128; `UINT32_MAX`: until the model ends or the context is full).
   */
  uint32_t n_predict;
  /**
   * 1 puts the prompt into the model's chat template, as the user's message.
   */
  uint32_t chat;
  /**
   * 1 goes on from what the session has read and said, of the same kind, a chat or a text; 0 begins anew.
   */
  uint32_t keep;
  /**
   * 1 always takes the likeliest token.
   */
  uint32_t greedy;
  /**
   * Draws among so many of the likeliest tokens (0: 40; below 0: all).
   */
  int32_t top_k;
  /**
   * Temperature (0: 0.8).
   */
  float temp;
  /**
   * Draws among the likeliest tokens that hold this probability together (0: 0.95).
   */
  float top_p;
  /**
   * Drops tokens below this share of the likeliest one's probability (0: 0.05).
   */
  float min_p;
  /**
   * Makes recent tokens less likely (0: 1, which is off).
   */
  float repeat_penalty;
  /**
   * Seed of the draws.
   */
  uint64_t seed;
  /**
   * The system message that a chat begins with (where one goes on it has no effect): UTF-8; NULL for none.
   */
  const char *system;
  /**
   * Bytes of `system`.
   */
  size_t system_length;
} engraft_generate_params;

/**
 * Takes the text as it comes: UTF-8 in whole characters, which no NUL ends; false stops. Called on the
 * thread of the call that it was given to.
 */
typedef bool (*engraft_token_callback)(const char *text, size_t length, void *user);

/**
 * What was generated.
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
   * Tokens of the prompt, with the template's and the examples'.
   */
  uint64_t prompt_tokens;
  /**
   * Tokens generated.
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
   * Swaps of the slot that the last token was computed after; 0 without a slot.
   */
  uint64_t generation;
} engraft_generate_info;

/**
 * How a store is opened. Zero is the default of everything.
 */
typedef struct {
  /**
   * `sizeof(engraft_store_params)`.
   */
  uint32_t struct_size;
  /**
   * 1 refuses a folder that is none of a store, instead of making it one.
   */
  uint32_t must_exist;
} engraft_store_params;

/**
 * A generation.
 */
typedef struct {
  /**
   * `sizeof(engraft_generation_info)`.
   */
  uint32_t struct_size;
  /**
   * `ENGRAFT_KIND_*`; 0 where nothing was ever promoted, and then all else is 0 too.
   */
  uint32_t kind;
  /**
   * Its number, from 1.
   */
  uint64_t number;
  /**
   * What a rollback leads to; 0 for nothing.
   */
  uint64_t previous;
  /**
   * Bytes of its files.
   */
  uint64_t bytes;
  /**
   * Generations that should have been taken before it, and were damaged: the log says why.
   */
  uint64_t passed_over;
  /**
   * What identifies the model that it is for.
   */
  uint8_t base_digest[32];
} engraft_generation_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The interface's version that the library was built with; compare it with `ENGRAFT_ABI_VERSION`.
 */
uint32_t engraft_abi_version(void);

/**
 * Copies the library's own version, such as "0.1.0"; see `engraft_message` for the buffer.
 */
int32_t engraft_version(char *buffer, size_t capacity, size_t *length);

/**
 * Makes all settings the default. `struct_size` is `sizeof(engraft_adapter_params)`.
 */
int32_t engraft_adapter_default_params(engraft_adapter_params *params, size_t struct_size);

/**
 * Loads an adapter from its file, or from a folder that holds `adapter.engraft`, and holds it against the
 * model: base, shapes, and what it computed when it was saved. `params` may be NULL. `*adapter` is freed
 * with `engraft_adapter_free`.
 */
int32_t engraft_adapter_load(const engraft_model *model,
                             const char *path,
                             size_t path_length,
                             const engraft_adapter_params *params,
                             engraft_adapter **adapter);

/**
 * Frees an adapter; sessions and slots that use it keep what they need. NULL is nothing.
 */
int32_t engraft_adapter_free(engraft_adapter *adapter);

/**
 * Tells what an adapter is. Set `struct_size` before.
 */
int32_t engraft_adapter_get_info(const engraft_adapter *adapter, engraft_adapter_info *info);

/**
 * Commits an adapter as `adapter.engraft` in a folder, which is made if it is missing; a `half` of 1 stores
 * it in 16 bits. When this returns 0, the file is on disk and was read back; readable by its owner only. `BUSY`
 * where a trainer has its checkpoints in the folder, or another call or process writes to it.
 */
int32_t engraft_adapter_save(const engraft_adapter *adapter,
                             const char *folder,
                             size_t folder_length,
                             uint32_t half);

/**
 * Makes a slot that holds nothing: sessions that follow it use the base alone. `*slot` is freed with
 * `engraft_slot_free`.
 */
int32_t engraft_slot_create(engraft_slot **slot);

/**
 * Frees a slot; sessions that follow it keep what it held. NULL is nothing.
 */
int32_t engraft_slot_free(engraft_slot *slot);

/**
 * Puts an adapter into a slot, or with NULL the base alone: sessions that follow it use it from the next
 * token that each reads. Waits for nobody where adapter and slot are of one model handle; else the digests of both
 * files may be computed, which reads them whole. `*generation` counts the swaps; it may be NULL. `BASE_MISMATCH`
 * for an adapter of another model than the slot is for.
 */
int32_t engraft_slot_swap(const engraft_slot *slot,
                          const engraft_adapter *adapter,
                          uint64_t *generation);

/**
 * Makes all settings the default. `struct_size` is `sizeof(engraft_data_params)`.
 */
int32_t engraft_data_default_params(engraft_data_params *params, size_t struct_size);

/**
 * Reads rows from a file, or from a folder with `train.jsonl`, and `valid.jsonl` and `test.jsonl` if they
 * are there. `params` may be NULL. `*data` is freed with `engraft_data_free`. A gate reads the files once more,
 * and refuses them if they have changed: leave them as they are until it was run.
 */
int32_t engraft_data_open(const engraft_model *model,
                          const char *path,
                          size_t path_length,
                          const engraft_data_params *params,
                          engraft_data **data);

/**
 * Reads rows that are in memory: JSON, one object a line, as such files have it. `valid` and `test` may be
 * NULL; then a share of `train` takes their place. The library keeps a copy of everything. `params` may be
 * NULL. `*data` is freed with `engraft_data_free`.
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
 * Frees data, at once or as soon as no trainer and no gate uses it. NULL is nothing.
 */
int32_t engraft_data_free(engraft_data *data);

/**
 * Tells what rows there are. Set `struct_size` before.
 */
int32_t engraft_data_get_info(const engraft_data *data, engraft_data_info *info);

/**
 * Copies where the `index`-th row that was left out stood, and why it was: never its text. The first
 * thousand of a part are named; beyond them this is `MISUSE`. See `engraft_message` for the buffer.
 */
int32_t engraft_data_skipped(const engraft_data *data,
                             size_t index,
                             char *buffer,
                             size_t capacity,
                             size_t *length);

/**
 * Copies the message of the last call that failed on a handle; with NULL, of the last call of this thread
 * that failed, whatever it was called on (also where no handle was made). Works on handles that are busy
 * or poisoned, and leaves all messages as they are.
 *
 * This and every other function that copies text writes at most `capacity` bytes into `buffer`, a NUL
 * among them, and puts the whole text's length (without the NUL) into `length` unless that is NULL. A
 * `buffer` of NULL with a `capacity` of 0 asks for the length alone.
 */
int32_t engraft_message(const void *handle, char *buffer, size_t capacity, size_t *length);

/**
 * The name of a code, such as "BUSY"; "UNKNOWN" for a number that isn't a code of this library. The text is static:
 * never freed, and valid as long as the library is loaded.
 */
const char *engraft_code_name(int32_t code);

/**
 * Makes all settings the default. `struct_size` is `sizeof(engraft_gate_params)`.
 */
int32_t engraft_gate_default_params(engraft_gate_params *params, size_t struct_size);

/**
 * Makes a gate for data; nothing is computed yet. `params` may be NULL. `*gate` is freed with
 * `engraft_gate_free`.
 */
int32_t engraft_gate_create(const engraft_model *model,
                            const engraft_data *data,
                            const engraft_gate_params *params,
                            engraft_gate **gate);

/**
 * Frees a gate and what it kept. `BUSY` while a call runs on it. NULL is nothing.
 */
int32_t engraft_gate_free(engraft_gate *gate);

/**
 * Trains and measures all arms, and judges them: 0 whatever the verdict is. `callback` may be NULL; false
 * from it ends the call with `CANCELLED`, and nothing is judged. What an earlier run judged is gone as soon as
 * this begins. `BAD_DATA` where the data is of files that have changed since they were opened.
 */
int32_t engraft_gate_run(const engraft_gate *gate,
                         engraft_progress_callback callback,
                         void *user);

/**
 * Puts the decision (`ENGRAFT_DECISION_*`) into `*decision`, and copies the name of the arm that it names,
 * which may be empty; see `engraft_message` for the buffer.
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
 * Copies the report as one HTML page, which holds sample rows and answers to them; see `engraft_message`
 * for the buffer.
 */
int32_t engraft_gate_report(const engraft_gate *gate, char *buffer, size_t capacity, size_t *length);

/**
 * Copies what the verdict names: an adapter, or examples. `GATE_REFUSED` where the base alone stays.
 * `*adapter` is freed with `engraft_adapter_free`.
 */
int32_t engraft_gate_adapter(const engraft_gate *gate, engraft_adapter **adapter);

/**
 * Ends the call that runs, and those that follow, with `CANCELLED`, until `engraft_gate_resume`. From
 * anywhere, at any time.
 */
int32_t engraft_gate_cancel(const engraft_gate *gate);

/**
 * Lets the call that runs wait, until `engraft_gate_resume` or `engraft_gate_cancel`. From anywhere, at any
 * time.
 */
int32_t engraft_gate_pause(const engraft_gate *gate);

/**
 * Takes back a pause and a cancellation. From anywhere, at any time.
 */
int32_t engraft_gate_resume(const engraft_gate *gate);

/**
 * Says how hot the device is (`ENGRAFT_THERMAL_*`): the comparison rests accordingly. From anywhere, at any
 * time.
 */
int32_t engraft_gate_set_thermal(const engraft_gate *gate, int32_t thermal);

/**
 * Hands all lines up to `level` to `callback`, instead of to the one before; NULL ends it. When this
 * returns, the one before is not running and never will again (but for a call that this one is made from).
 * `BUSY` where the program has a logger for Rust code already, which the library's lines then go to.
 */
int32_t engraft_log_set(engraft_log_callback callback, void *user, int32_t level);

/**
 * Makes all settings the default. `struct_size` is `sizeof(engraft_model_params)`.
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
 * Frees a model, at once or as soon as nothing that was made of it is left. NULL is nothing.
 */
int32_t engraft_model_free(engraft_model *model);

/**
 * Tells what a model is. Set `struct_size` before.
 */
int32_t engraft_model_get_info(const engraft_model *model, engraft_model_info *info);

/**
 * Copies the model's own name (`general.name`), which may be empty; see `engraft_message` for the buffer.
 */
int32_t engraft_model_name(const engraft_model *model, char *buffer, size_t capacity, size_t *length);

/**
 * Puts the 32 bytes that identify the model to adapters into `digest`. The first time, this reads the whole
 * file, unless a digest cache knows it.
 */
int32_t engraft_model_digest(const engraft_model *model, uint8_t *digest);

/**
 * Gives back memory that can be had again: the tokenizer, unless something uses it. For warnings of low
 * memory.
 */
int32_t engraft_model_trim(const engraft_model *model);

/**
 * Makes all settings the default. `struct_size` is `sizeof(engraft_train_params)`.
 */
int32_t engraft_train_default_params(engraft_train_params *params, size_t struct_size);

/**
 * Plans a run; 0 also where it does not fit, which the plan tells. Without `data` (NULL), rows are taken for
 * as long as they may be by default. `params` may be NULL. `*plan` is freed with `engraft_plan_free`.
 */
int32_t engraft_plan_create(const engraft_model *model,
                            const engraft_data *data,
                            const engraft_train_params *params,
                            engraft_plan **plan);

/**
 * Frees a plan. NULL is nothing.
 */
int32_t engraft_plan_free(engraft_plan *plan);

/**
 * Tells what a plan says. Set `struct_size` before.
 */
int32_t engraft_plan_get_info(const engraft_plan *plan, engraft_plan_info *info);

/**
 * Copies the name of the `index`-th pool, and puts its size into `*bytes`, unless that is NULL; see
 * `engraft_message` for the buffer.
 */
int32_t engraft_plan_pool(const engraft_plan *plan,
                          size_t index,
                          char *buffer,
                          size_t capacity,
                          size_t *length,
                          uint64_t *bytes);

/**
 * Copies why a plan does not fit, and what would; an empty text where it fits. See `engraft_message` for
 * the buffer.
 */
int32_t engraft_plan_advice(const engraft_plan *plan, char *buffer, size_t capacity, size_t *length);

/**
 * Puts the bytes that a session with these settings will take, with adapters up to `rank`, into `*bytes`:
 * its cache and buffers. The tokenizer comes to it once a model. `params` may be NULL. `MISUSE` for a rank above
 * 4096: adapters of 256 at most, several of them stacked.
 */
int32_t engraft_session_bytes(const engraft_model *model,
                              const engraft_session_params *params,
                              uint32_t rank,
                              uint64_t *bytes);

/**
 * Makes all settings the default. `struct_size` is `sizeof(engraft_session_params)`.
 */
int32_t engraft_session_default_params(engraft_session_params *params, size_t struct_size);

/**
 * Makes all settings the default. `struct_size` is `sizeof(engraft_generate_params)`.
 */
int32_t engraft_generate_default_params(engraft_generate_params *params, size_t struct_size);

/**
 * Makes a session on a model, with an adapter or (NULL) with the base alone. `params` may be NULL.
 * `*session` is freed with `engraft_session_free`. `BASE_MISMATCH` for an adapter of another model: of another
 * handle it is taken once the digests of both files are found equal.
 */
int32_t engraft_session_create(const engraft_model *model,
                               const engraft_adapter *adapter,
                               const engraft_session_params *params,
                               engraft_session **session);

/**
 * Frees a session and ends its threads. `BUSY` while a call runs on it. NULL is nothing.
 */
int32_t engraft_session_free(engraft_session *session);

/**
 * Uses an adapter, or with NULL the base alone, from the next token on, and no slot any more. What the
 * session has read already stays as it was computed. `BASE_MISMATCH` for an adapter of another model.
 */
int32_t engraft_session_set_adapter(const engraft_session *session, const engraft_adapter *adapter);

/**
 * Takes the adapter from a slot from now on, looked at before every token: see `engraft_slot_swap`.
 * `BASE_MISMATCH` for a slot of another model.
 */
int32_t engraft_session_follow(const engraft_session *session, const engraft_slot *slot);

/**
 * Continues a prompt (UTF-8), or answers it as a chat, and hands the text to `callback` as it comes.
 * `params`, `callback` and `info` may be NULL; set the `struct_size` of `info` before. Returns `CANCELLED`
 * when the callback answers false or `engraft_session_cancel` was called; `info` is filled then, too. Stopped
 * before the first token, it has none, and the session goes on as if nothing had been asked; with
 * `keep` 0 what came before is forgotten all the same. `DOES_NOT_FIT` where the cache is more than the system leaves.
 */
int32_t engraft_session_generate(const engraft_session *session,
                                 const char *prompt,
                                 size_t prompt_length,
                                 const engraft_generate_params *params,
                                 engraft_token_callback callback,
                                 void *user,
                                 engraft_generate_info *info);

/**
 * Stops the call that runs before its next token; without one, nothing happens. From anywhere, at any time.
 */
int32_t engraft_session_cancel(const engraft_session *session);

/**
 * Forgets everything that was read and said.
 */
int32_t engraft_session_reset(const engraft_session *session);

/**
 * Gives back the memory of the cache and the buffers, and forgets what was read and said; the next call
 * takes them again. For warnings of low memory.
 */
int32_t engraft_session_trim(const engraft_session *session);

/**
 * Makes all settings the default. `struct_size` is `sizeof(engraft_store_params)`.
 */
int32_t engraft_store_default_params(engraft_store_params *params, size_t struct_size);

/**
 * Opens the store in a folder, which is made if it is missing, readable by its owner only. `params` may be
 * NULL. `*store` is freed with `engraft_store_free`.
 */
int32_t engraft_store_open(const char *folder,
                           size_t folder_length,
                           const engraft_store_params *params,
                           engraft_store **store);

/**
 * Frees a store; the folder stays as it is. NULL is nothing.
 */
int32_t engraft_store_free(engraft_store *store);

/**
 * Makes what a gate's verdict names the active generation, and puts its number into `*generation` (which may
 * be NULL). `GATE_REFUSED` where the base alone stays: then nothing is changed. When this returns 0,
 * everything is on disk and was read back.
 */
int32_t engraft_store_promote(const engraft_store *store, const engraft_gate *gate, uint64_t *generation);

/**
 * Makes an adapter the active generation on the caller's own judgement, past the gate. `verdict` is kept
 * beside it as it is: say why. `*generation` may be NULL.
 */
int32_t engraft_store_promote_adapter(const engraft_store *store,
                                      const engraft_adapter *adapter,
                                      const char *verdict,
                                      size_t verdict_length,
                                      uint64_t *generation);

/**
 * Tells which generation is active, its files verified. Set `struct_size` before.
 */
int32_t engraft_store_active(const engraft_store *store, engraft_generation_info *info);

/**
 * Loads the active generation, held against the model: an adapter, examples, or the base alone (also where
 * nothing was ever promoted). `params` may be NULL. `*adapter` is freed with `engraft_adapter_free`.
 */
int32_t engraft_store_load(const engraft_store *store,
                           const engraft_model *model,
                           const engraft_adapter_params *params,
                           engraft_adapter **adapter);

/**
 * Makes the generation active that was active before the active one, and puts its number into `*generation`
 * (which may be NULL). `MISUSE` where there is none.
 */
int32_t engraft_store_rollback(const engraft_store *store, uint64_t *generation);

/**
 * Makes any generation active that verifies.
 */
int32_t engraft_store_activate(const engraft_store *store, uint64_t generation);

/**
 * Removes all generations but the newest `keep` that are whole, the active one, and the one that a rollback
 * leads to; puts how many went into `*removed` (which may be NULL). `MISUSE` for a `keep` of 0.
 */
int32_t engraft_store_prune(const engraft_store *store, size_t keep, uint64_t *removed);

/**
 * Copies a list of all generations as JSON: `{"active":2,"generations":[{"number":1,"kind":"adapter",…}]}`;
 * see `engraft_message` for the buffer.
 */
int32_t engraft_store_list(const engraft_store *store, char *buffer, size_t capacity, size_t *length);

/**
 * Makes a trainer: plans, refuses what exceeds the budget (`DOES_NOT_FIT`, before anything large is
 * allocated), and allocates everything that training takes. `params` may be NULL. `*trainer` is freed with
 * `engraft_trainer_free`.
 */
int32_t engraft_trainer_create(const engraft_model *model,
                               const engraft_data *data,
                               const engraft_train_params *params,
                               engraft_trainer **trainer);

/**
 * Frees a trainer and ends its threads. `BUSY` while a call runs on it. NULL is nothing.
 */
int32_t engraft_trainer_free(engraft_trainer *trainer);

/**
 * One step. `progress` may be NULL; else set its `struct_size` before. `MISUSE` once all steps are done. Where a
 * step was skipped for a loss that is not finite, or the run went back to its checkpoint (see
 * `engraft_trainer_checkpoint`), `event` of `progress` is `ENGRAFT_EVENT_NOTE`, `step` has not risen or has
 * fallen, and the log says why.
 */
int32_t engraft_trainer_step(const engraft_trainer *trainer,
                             engraft_progress *progress);

/**
 * So many steps, or with 0 all that are left. `callback` may be NULL; it is called after each step, and
 * false from it ends the call with `CANCELLED`. What was trained stays, and another call goes on. Where the run
 * goes back to its checkpoint, `step` falls, a note says so, and the steps are done anew.
 */
int32_t engraft_trainer_run(const engraft_trainer *trainer,
                            uint64_t steps,
                            engraft_progress_callback callback,
                            void *user);

/**
 * Puts the loss on the rows to validate with into `*loss`: of the base before the first step, with the
 * adapter afterwards. `BAD_DATA` where there are none.
 */
int32_t engraft_trainer_evaluate(const engraft_trainer *trainer, double *loss);

/**
 * Tells how far a run is. Set `struct_size` before. `BUSY` while it runs: the callback is told then.
 */
int32_t engraft_trainer_progress(const engraft_trainer *trainer, engraft_progress *progress);

/**
 * Commits the adapter as it is now as `adapter.engraft` in a folder, which is made if it is missing. When
 * this returns 0, the file is on disk and was read back; readable by its owner only. `BUSY` where another trainer
 * has its checkpoints in the folder, or another call or process writes to it.
 */
int32_t engraft_trainer_save(const engraft_trainer *trainer,
                             const char *folder,
                             size_t folder_length);

/**
 * Commits everything that the run needs to go on, and beside it the adapter as `engraft_trainer_save` does, in a
 * folder, which is made if it is missing. When this returns 0, both are on disk and were read back. From then on
 * the folder is this trainer's, until it is freed or names another one: all others that write there, trainers
 * and `engraft_adapter_save` in this process, too, get `BUSY`, as this call does where there is such a writer
 * already. The newest two checkpoints stay there; those of another run are replaced. A run that diverges (three
 * steps in a row without a finite loss, or a loss that grows without end) returns to its last checkpoint at half
 * the learning rate and tells so by a note; after three returns, or without a checkpoint, its steps are
 * `NONFINITE`.
 */
int32_t engraft_trainer_checkpoint(const engraft_trainer *trainer,
                                   const char *folder,
                                   size_t folder_length);

/**
 * Goes on where the newest whole checkpoint in a folder stood, to the same result as if the run had never
 * stopped. The trainer must have taken no step, and be created with the model, rows and settings of the run:
 * `BASE_MISMATCH` or `MISUSE` names what differs. `IO` where there is no checkpoint, `CORRUPT` where none is
 * whole; then the trainer is as it was.
 */
int32_t engraft_trainer_restore(const engraft_trainer *trainer, const char *folder, size_t folder_length);

/**
 * Copies the adapter as it is now, for sessions, slots and stores. `*adapter` is freed with
 * `engraft_adapter_free`.
 */
int32_t engraft_trainer_adapter(const engraft_trainer *trainer, engraft_adapter **adapter);

/**
 * Ends the call that runs, and those that follow, with `CANCELLED` before their next step, until
 * `engraft_trainer_resume`. From anywhere, at any time. Saving goes on.
 */
int32_t engraft_trainer_cancel(const engraft_trainer *trainer);

/**
 * Lets the call that runs, and those that follow, wait before their next step, until
 * `engraft_trainer_resume` or `engraft_trainer_cancel`. From anywhere, at any time.
 */
int32_t engraft_trainer_pause(const engraft_trainer *trainer);

/**
 * Takes back a pause and a cancellation. From anywhere, at any time.
 */
int32_t engraft_trainer_resume(const engraft_trainer *trainer);

/**
 * Says how hot the device is (`ENGRAFT_THERMAL_*`): training rests accordingly. From anywhere, at any time.
 */
int32_t engraft_trainer_set_thermal(const engraft_trainer *trainer, int32_t thermal);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ENGRAFT_H */
