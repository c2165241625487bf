/*
 * A whole life through the C interface, and every misuse that has a code.
 *
 *   cargo build -p engraft-capi
 *   cc -std=c11 -Wall -Wextra -Werror -Itargets/capi/include targets/capi/tests/smoke.c \
 *      target/debug/libengraft.a -lpthread -ldl -lm -o smoke
 *   ./smoke targets/cli/seedling.gguf targets/cli/demo/private_train.jsonl FOLDER
 *
 * FOLDER must exist and be empty. With a library that has debug assertions, -DPANIC_INJECTION may be added.
 * -DBRIEF spares what takes longest, -DBROKEN writes past a block. Prints what failed, and returns 1 if anything did.
 */
#include "engraft.h"

#include <stdatomic.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* For tools that make everything hundreds of times slower, and run one thread at a time: others would only
 * spin while they wait for work. */
#ifdef BRIEF
#define THREADS 1
#define ROWS 8
#define TOKENS 4
#define STEPS 7
#else
#define THREADS 2
#define ROWS SIZE_MAX
#define TOKENS 24
#define STEPS 12
#endif

static int failures = 0;

#define EXPECT(code, call) expect(__LINE__, #call, code, call)
#define CHECK(truth) check(__LINE__, #truth, truth)

static void check(int line, const char *what, bool truth)
{
  if (!truth) {
    failures++;
    fprintf(stderr, "smoke.c:%d: %s does not hold\n", line, what);
  }
}

static void expect(int line, const char *what, int32_t wanted, int32_t got)
{
  if (wanted == got)
    return;
  char message[512] = "";
  engraft_message(NULL, message, sizeof message, NULL);
  failures++;
  fprintf(stderr, "smoke.c:%d: %s gave %s instead of %s (%s)\n", line, what, engraft_code_name(got),
          engraft_code_name(wanted), message);
}

/* Texts are a pointer and a length. */
#define TEXT(text) (text), strlen(text)

/* What a test holds throughout. */
typedef struct {
  const char *model_path;
  const char *folder;
  char *rows;
  size_t rows_length;
  engraft_model *model;
  engraft_data *data;
} world;

static char *read_file(const char *path, size_t *length)
{
  FILE *file = fopen(path, "rb");
  if (!file)
    return NULL;
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  char *bytes = size > 0 ? malloc((size_t)size) : NULL;
  *length = bytes ? fread(bytes, 1, (size_t)size, file) : 0;
  fclose(file);
  return bytes;
}

/* The bytes of so many lines. */
static size_t of_rows(const char *rows, size_t length, size_t count)
{
  size_t end = 0;
  while (end < length && count > 0)
    count -= rows[end++] == '\n';
  return end;
}

/* FOLDER/NAME; the result is valid until the next call. */
static const char *within(const world *w, const char *name)
{
  static char path[4096];
  snprintf(path, sizeof path, "%s/%s", w->folder, name);
  return path;
}

/* ---- Versions, messages, logging -------------------------------------------------------------- */

/* Lines come from any thread. */
static atomic_int lines_logged = 0;

static void log_line(int32_t level, const char *text, size_t length, void *user)
{
  (void)level, (void)text, (void)length;
  atomic_fetch_add((atomic_int *)user, 1);
}

static void test_versions(void)
{
  char text[64];
  size_t length = 0;
  CHECK(engraft_abi_version() >> 16 == ENGRAFT_ABI_VERSION >> 16);
  EXPECT(ENGRAFT_OK, engraft_version(text, sizeof text, &length));
  CHECK(length > 0 && strlen(text) == length);
  EXPECT(ENGRAFT_OK, engraft_version(NULL, 0, &length));
  EXPECT(ENGRAFT_TOO_SMALL, engraft_version(text, 2, &length));
  CHECK(strlen(text) == 1 && length > 1);
  EXPECT(ENGRAFT_MISUSE, engraft_version(NULL, 9, NULL));
  CHECK(strcmp(engraft_code_name(ENGRAFT_BUSY), "BUSY") == 0);
  CHECK(strcmp(engraft_code_name(-999), "UNKNOWN") == 0);
  EXPECT(ENGRAFT_MISUSE, engraft_log_set(log_line, &lines_logged, 99));
  EXPECT(ENGRAFT_OK, engraft_log_set(log_line, &lines_logged, ENGRAFT_LOG_DEBUG));
}

/* ---- Models ----------------------------------------------------------------------------------- */

static void test_model(world *w)
{
  engraft_model *none = (engraft_model *)w;
  char text[512];
  size_t length = 0;
  EXPECT(ENGRAFT_MISUSE, engraft_model_open(NULL, 0, NULL, &none));
  CHECK(none == NULL);
  EXPECT(ENGRAFT_MISUSE, engraft_model_open(NULL, 7, NULL, &none));
  EXPECT(ENGRAFT_MISUSE, engraft_model_open(TEXT("\xff"), NULL, &none));
  EXPECT(ENGRAFT_MISUSE, engraft_model_open(TEXT(w->model_path), NULL, NULL));
  EXPECT(ENGRAFT_IO, engraft_model_open(TEXT(within(w, "no such file")), NULL, &none));
  EXPECT(ENGRAFT_OK, engraft_message(NULL, text, sizeof text, &length));
  CHECK(strstr(text, "no such file") != NULL && strlen(text) == length);

  engraft_model_params params;
  EXPECT(ENGRAFT_MISUSE, engraft_model_default_params(NULL, sizeof params));
  EXPECT(ENGRAFT_MISUSE, engraft_model_default_params(&params, 4));
  EXPECT(ENGRAFT_OK, engraft_model_default_params(&params, sizeof params));
  params.no_mmap = 1;
  EXPECT(ENGRAFT_OK, engraft_model_open(TEXT(w->model_path), &params, &none));
  CHECK(none != NULL);
  EXPECT(ENGRAFT_OK, engraft_model_free(none));
  EXPECT(ENGRAFT_MISUSE, engraft_model_free(none));
  EXPECT(ENGRAFT_MISUSE, engraft_model_trim(none));
  EXPECT(ENGRAFT_OK, engraft_model_free(NULL));

  EXPECT(ENGRAFT_OK, engraft_model_open(TEXT(w->model_path), NULL, &w->model));
  engraft_model_info info = {0};
  EXPECT(ENGRAFT_MISUSE, engraft_model_get_info(w->model, &info));
  EXPECT(ENGRAFT_MISUSE, engraft_model_get_info(w->model, NULL));
  info.struct_size = sizeof info;
  EXPECT(ENGRAFT_OK, engraft_model_get_info(w->model, &info));
  CHECK(info.struct_size == sizeof info && info.n_layers > 0 && info.mapped_bytes > 0);
  uint8_t digest[32] = {0}, zeros[32] = {0};
  EXPECT(ENGRAFT_OK, engraft_model_digest(w->model, digest));
  CHECK(memcmp(digest, zeros, sizeof digest) != 0);
  EXPECT(ENGRAFT_MISUSE, engraft_model_digest(w->model, NULL));
  EXPECT(ENGRAFT_OK, engraft_model_name(w->model, text, sizeof text, &length));
  EXPECT(ENGRAFT_OK, engraft_model_trim(w->model));
  /* The message of the last failure stays with the handle. */
  EXPECT(ENGRAFT_OK, engraft_message(w->model, text, sizeof text, &length));
  CHECK(strcmp(text, "digest is NULL") == 0);
  EXPECT(ENGRAFT_MISUSE, engraft_message(w, text, sizeof text, &length));
}

/* ---- Structs of other versions ---------------------------------------------------------------- */

static void test_structs(const world *w)
{
  struct {
    engraft_session_params now;
    uint64_t then;
  } later;
  engraft_session *session = NULL;
  memset(&later, 0, sizeof later);
  later.now.ctx_size = 64;
  later.now.threads = 1;
  later.now.struct_size = sizeof later;
  EXPECT(ENGRAFT_OK, engraft_session_create(w->model, NULL, &later.now, &session));
  EXPECT(ENGRAFT_OK, engraft_session_free(session));
  later.then = 1;
  EXPECT(ENGRAFT_UNSUPPORTED_VERSION, engraft_session_create(w->model, NULL, &later.now, &session));
  CHECK(session == NULL);
  later.now.struct_size = sizeof later.now;
  EXPECT(ENGRAFT_OK, engraft_session_create(w->model, NULL, &later.now, &session));
  EXPECT(ENGRAFT_OK, engraft_session_free(session));
  uint32_t wrong[] = {0, 4, sizeof later.now - 1, UINT32_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    later.now.struct_size = wrong[i];
    EXPECT(ENGRAFT_MISUSE, engraft_session_create(w->model, NULL, &later.now, &session));
  }
  later.now.struct_size = sizeof later.now;
  later.now.cache_type = 77;
  EXPECT(ENGRAFT_MISUSE, engraft_session_create(w->model, NULL, &later.now, &session));
}

/* ---- Data and plans --------------------------------------------------------------------------- */

static void test_data(world *w)
{
  engraft_data *none = NULL;
  const uint8_t *rows = (const uint8_t *)w->rows;
  const uint8_t *nonsense = (const uint8_t *)"{\"a\":1}\n";
  EXPECT(ENGRAFT_MISUSE, engraft_data_open(NULL, TEXT(w->folder), NULL, &none));
  EXPECT(ENGRAFT_IO, engraft_data_open(w->model, TEXT(within(w, "none.jsonl")), NULL, &none));
  EXPECT(ENGRAFT_BAD_DATA, engraft_data_from_memory(w->model, nonsense, 8, NULL, 0, NULL, 0, NULL, &none));
  EXPECT(ENGRAFT_BAD_DATA, engraft_data_from_memory(w->model, NULL, 0, NULL, 0, NULL, 0, NULL, &none));
  EXPECT(ENGRAFT_MISUSE, engraft_data_from_memory(w->model, NULL, 5, NULL, 0, NULL, 0, NULL, &none));
  engraft_data_params params;
  EXPECT(ENGRAFT_OK, engraft_data_default_params(&params, sizeof params));
  params.task = 99;
  EXPECT(ENGRAFT_MISUSE,
         engraft_data_from_memory(w->model, rows, w->rows_length, NULL, 0, NULL, 0, &params, &none));
  params.task = ENGRAFT_TASK_NONE;
  params.valid_fraction = 0.25;
  EXPECT(ENGRAFT_OK,
         engraft_data_from_memory(w->model, rows, w->rows_length, NULL, 0, NULL, 0, &params, &w->data));
  engraft_data_info info = {.struct_size = sizeof info};
  EXPECT(ENGRAFT_OK, engraft_data_get_info(w->data, &info));
  CHECK(info.train_rows > info.valid_rows && info.valid_rows > 0 && info.split_by_seed == 1);
  CHECK(info.skipped == 0);
  char text[64];
  EXPECT(ENGRAFT_MISUSE, engraft_data_skipped(w->data, 0, text, sizeof text, NULL));
  /* One kind of handle in the place of another. */
  EXPECT(ENGRAFT_MISUSE, engraft_data_get_info((const engraft_data *)w->model, &info));
  EXPECT(ENGRAFT_MISUSE, engraft_model_free((engraft_model *)w->data));
}

static void test_plan(const world *w)
{
  engraft_plan *plan = NULL;
  engraft_train_params params;
  EXPECT(ENGRAFT_OK, engraft_train_default_params(&params, sizeof params));
  EXPECT(ENGRAFT_OK, engraft_plan_create(w->model, w->data, &params, &plan));
  engraft_plan_info info = {.struct_size = sizeof info};
  EXPECT(ENGRAFT_OK, engraft_plan_get_info(plan, &info));
  uint64_t sum = 0, bytes = 0;
  char name[64];
  for (size_t i = 0; i < info.pools; i++) {
    EXPECT(ENGRAFT_OK, engraft_plan_pool(plan, i, name, sizeof name, NULL, &bytes));
    sum += bytes;
  }
  CHECK(info.fits == 1 && sum == info.private_bytes && sum > 0);
  EXPECT(ENGRAFT_MISUSE, engraft_plan_pool(plan, info.pools, name, sizeof name, NULL, &bytes));
  EXPECT(ENGRAFT_OK, engraft_plan_free(plan));

  params.memory_budget = 1 << 20;
  EXPECT(ENGRAFT_OK, engraft_plan_create(w->model, NULL, &params, &plan));
  EXPECT(ENGRAFT_OK, engraft_plan_get_info(plan, &info));
  size_t length = 0;
  EXPECT(ENGRAFT_OK, engraft_plan_advice(plan, NULL, 0, &length));
  CHECK(info.fits == 0 && length > 0);
  EXPECT(ENGRAFT_OK, engraft_plan_free(plan));
  engraft_trainer *trainer = NULL;
  EXPECT(ENGRAFT_DOES_NOT_FIT, engraft_trainer_create(w->model, w->data, &params, &trainer));
  CHECK(trainer == NULL);
  params.memory_budget = 0;
  params.rank = 1000;
  EXPECT(ENGRAFT_MISUSE, engraft_plan_create(w->model, w->data, &params, &plan));
  EXPECT(ENGRAFT_OK, engraft_session_bytes(w->model, NULL, 8, &bytes));
  CHECK(bytes > 0);
}

/* ---- Training --------------------------------------------------------------------------------- */

/* What the progress callback of a run sees and does. */
typedef struct {
  engraft_trainer *trainer;
  uint64_t steps;
  uint64_t held;
  uint64_t stop_after;
  bool meddle;
} watch;

/* Another thread finds the trainer busy, and may steer it all the same. */
static void *meddle(void *user)
{
  engraft_trainer *trainer = ((watch *)user)->trainer;
  engraft_progress progress = {.struct_size = sizeof progress};
  EXPECT(ENGRAFT_BUSY, engraft_trainer_step(trainer, NULL));
  EXPECT(ENGRAFT_BUSY, engraft_trainer_progress(trainer, &progress));
  EXPECT(ENGRAFT_BUSY, engraft_trainer_free(trainer));
  EXPECT(ENGRAFT_OK, engraft_trainer_set_thermal(trainer, ENGRAFT_THERMAL_FAIR));
  EXPECT(ENGRAFT_OK, engraft_trainer_pause(trainer));
  EXPECT(ENGRAFT_OK, engraft_trainer_resume(trainer));
  EXPECT(ENGRAFT_OK, engraft_trainer_set_thermal(trainer, ENGRAFT_THERMAL_NOMINAL));
  return NULL;
}

static bool on_progress(const engraft_progress *progress, void *user)
{
  watch *seen = user;
  CHECK(progress->struct_size >= sizeof *progress);
  if (progress->event == ENGRAFT_EVENT_HELD) {
    seen->held++;
    EXPECT(ENGRAFT_OK, engraft_trainer_resume(seen->trainer));
    return true;
  }
  seen->steps++;
  CHECK(progress->loss > 0 && progress->step > 0);
  /* From within a call, too. */
  EXPECT(ENGRAFT_BUSY, engraft_trainer_step(seen->trainer, NULL));
  if (seen->meddle) {
    pthread_t thread;
    seen->meddle = false;
    CHECK(pthread_create(&thread, NULL, meddle, seen) == 0);
    pthread_join(thread, NULL);
    EXPECT(ENGRAFT_OK, engraft_trainer_pause(seen->trainer));
  }
  return seen->stop_after == 0 || seen->steps < seen->stop_after;
}

enum { PATH_BYTES = 4200 };

static bool same_bytes(const char *a, const char *b)
{
  FILE *first = fopen(a, "rb"), *second = fopen(b, "rb");
  int left = 0, right = 1;
  if (first != NULL && second != NULL) {
    do {
      left = getc(first);
      right = getc(second);
    } while (left == right && left != EOF);
  }
  if (first != NULL)
    fclose(first);
  if (second != NULL)
    fclose(second);
  return left == right;
}

/* A run that was cut: another trainer goes on from its checkpoint, to the same adapter as the uncut one. */
static void test_restore(const world *w, engraft_trainer *uncut, const engraft_train_params *params)
{
  engraft_trainer *trainer = NULL;
  engraft_train_params other = *params;
  char first[PATH_BYTES], second[PATH_BYTES];
  double loss = 0;
  other.rank = 4;
  EXPECT(ENGRAFT_OK, engraft_trainer_create(w->model, w->data, &other, &trainer));
  EXPECT(ENGRAFT_MISUSE, engraft_trainer_restore(trainer, TEXT(within(w, "checkpoint"))));
  EXPECT(ENGRAFT_IO, engraft_trainer_restore(trainer, TEXT(within(w, "nowhere"))));
  EXPECT(ENGRAFT_OK, engraft_trainer_free(trainer));

  other = *params;
  other.threads = 1;
  EXPECT(ENGRAFT_OK, engraft_trainer_create(w->model, w->data, &other, &trainer));
  EXPECT(ENGRAFT_OK, engraft_trainer_restore(trainer, TEXT(within(w, "checkpoint"))));
  engraft_progress progress = {.struct_size = sizeof progress};
  EXPECT(ENGRAFT_OK, engraft_trainer_progress(trainer, &progress));
  CHECK(progress.step > 0 && progress.step < STEPS);
  /* To read is all that another than its trainer may do in a folder of checkpoints. */
  EXPECT(ENGRAFT_BUSY, engraft_trainer_checkpoint(trainer, TEXT(within(w, "checkpoint"))));
  EXPECT(ENGRAFT_BUSY, engraft_trainer_save(trainer, TEXT(within(w, "checkpoint"))));
  EXPECT(ENGRAFT_OK, engraft_trainer_save(uncut, TEXT(within(w, "checkpoint"))));
  EXPECT(ENGRAFT_OK, engraft_trainer_run(trainer, 0, NULL, NULL));
  EXPECT(ENGRAFT_MISUSE, engraft_trainer_restore(trainer, TEXT(within(w, "checkpoint"))));
  EXPECT(ENGRAFT_OK, engraft_trainer_evaluate(trainer, &loss));
  EXPECT(ENGRAFT_OK, engraft_trainer_evaluate(uncut, &loss));
  EXPECT(ENGRAFT_OK, engraft_trainer_save(trainer, TEXT(within(w, "resumed"))));
  EXPECT(ENGRAFT_OK, engraft_trainer_free(trainer));
  snprintf(first, sizeof first, "%s/adapter.engraft", within(w, "adapter"));
  snprintf(second, sizeof second, "%s/adapter.engraft", within(w, "resumed"));
  CHECK(same_bytes(first, second));
}

static engraft_trainer *test_trainer(const world *w)
{
  engraft_trainer *trainer = NULL;
  engraft_train_params params;
  EXPECT(ENGRAFT_OK, engraft_train_default_params(&params, sizeof params));
  params.steps = STEPS;
  params.learning_rate = 2e-3;
  params.threads = THREADS;
  EXPECT(ENGRAFT_MISUSE, engraft_trainer_create(w->model, NULL, &params, &trainer));
  EXPECT(ENGRAFT_MISUSE, engraft_trainer_create(w->model, w->data, &params, NULL));
  EXPECT(ENGRAFT_OK, engraft_trainer_create(w->model, w->data, &params, &trainer));
  double before = 0, after = 0;
  EXPECT(ENGRAFT_OK, engraft_trainer_evaluate(trainer, &before));
  engraft_progress progress = {.struct_size = sizeof progress};
  EXPECT(ENGRAFT_OK, engraft_trainer_step(trainer, &progress));
  CHECK(progress.step == 1 && progress.steps == STEPS && progress.tokens > 0);

  watch seen = {.trainer = trainer, .meddle = true};
  EXPECT(ENGRAFT_OK, engraft_trainer_run(trainer, 3, on_progress, &seen));
  CHECK(seen.steps == 3 && seen.held == 1);
  seen.stop_after = 5;
  EXPECT(ENGRAFT_CANCELLED, engraft_trainer_run(trainer, 0, on_progress, &seen));
  CHECK(seen.steps == 5);
  EXPECT(ENGRAFT_OK, engraft_trainer_cancel(trainer));
  EXPECT(ENGRAFT_CANCELLED, engraft_trainer_step(trainer, NULL));
  EXPECT(ENGRAFT_CANCELLED, engraft_trainer_run(trainer, 0, NULL, NULL));
  EXPECT(ENGRAFT_OK, engraft_trainer_checkpoint(trainer, TEXT(within(w, "checkpoint"))));
  EXPECT(ENGRAFT_OK, engraft_trainer_resume(trainer));
  EXPECT(ENGRAFT_MISUSE, engraft_trainer_set_thermal(trainer, 17));
  EXPECT(ENGRAFT_OK, engraft_trainer_run(trainer, 0, NULL, NULL));
  EXPECT(ENGRAFT_MISUSE, engraft_trainer_step(trainer, NULL));
  EXPECT(ENGRAFT_OK, engraft_trainer_evaluate(trainer, &after));
  CHECK(after < before);
  EXPECT(ENGRAFT_OK, engraft_trainer_progress(trainer, &progress));
  CHECK(progress.step == STEPS);
  EXPECT(ENGRAFT_MISUSE, engraft_trainer_save(trainer, NULL, 0));
  EXPECT(ENGRAFT_OK, engraft_trainer_save(trainer, TEXT(within(w, "adapter"))));
  test_restore(w, trainer, &params);
  return trainer;
}

/* ---- Generating and swapping ------------------------------------------------------------------ */

/* What comes of a generation. */
typedef struct {
  engraft_session *session;
  char text[4096];
  size_t length;
  size_t parts;
  size_t stop_after;
  bool meddle;
} heard;

/* Another thread finds the session busy, and may cancel it all the same. */
static void *meddle_session(void *user)
{
  engraft_session *session = ((heard *)user)->session;
  EXPECT(ENGRAFT_BUSY, engraft_session_generate(session, TEXT("x"), NULL, NULL, NULL, NULL));
  EXPECT(ENGRAFT_BUSY, engraft_session_set_adapter(session, NULL));
  EXPECT(ENGRAFT_BUSY, engraft_session_trim(session));
  EXPECT(ENGRAFT_BUSY, engraft_session_free(session));
  EXPECT(ENGRAFT_OK, engraft_session_cancel(session));
  return NULL;
}

static bool on_text(const char *text, size_t length, void *user)
{
  heard *all = user;
  if (all->length + length < sizeof all->text)
    memcpy(all->text + all->length, text, length), all->length += length;
  all->text[all->length] = 0;
  EXPECT(ENGRAFT_BUSY, engraft_session_reset(all->session));
  if (all->meddle) {
    pthread_t thread;
    all->meddle = false;
    CHECK(pthread_create(&thread, NULL, meddle_session, all) == 0);
    pthread_join(thread, NULL);
  }
  return all->stop_after == 0 || ++all->parts < all->stop_after;
}

static heard generate(engraft_session *session, const char *prompt, uint32_t keep)
{
  heard all = {.session = session};
  engraft_generate_params params;
  engraft_generate_info info = {.struct_size = sizeof info};
  EXPECT(ENGRAFT_OK, engraft_generate_default_params(&params, sizeof params));
  params.greedy = 1;
  params.prompting = ENGRAFT_PROMPT_CHAT;
  params.n_predict = TOKENS;
  params.keep = keep;
  EXPECT(ENGRAFT_OK, engraft_session_generate(session, TEXT(prompt), &params, on_text, &all, &info));
  CHECK(info.prompt_tokens > 0 && info.tokens > 0);
  return all;
}

static void test_session(const world *w, engraft_adapter *adapter)
{
  engraft_session *session = NULL;
  engraft_session_params params;
  EXPECT(ENGRAFT_OK, engraft_session_default_params(&params, sizeof params));
  params.threads = 1;
  EXPECT(ENGRAFT_MISUSE, engraft_session_create(NULL, NULL, &params, &session));
  EXPECT(ENGRAFT_OK, engraft_session_create(w->model, NULL, &params, &session));
  const char *prompt = "Turn on the lights in the cave.";
  heard base = generate(session, prompt, 0);
  EXPECT(ENGRAFT_OK, engraft_session_set_adapter(session, adapter));
  heard tuned = generate(session, prompt, 0);
  EXPECT(ENGRAFT_OK, engraft_session_set_adapter(session, NULL));
  heard again = generate(session, prompt, 0);
  CHECK(strcmp(base.text, again.text) == 0);

  engraft_slot *slot = NULL;
  uint64_t generation = 0;
  EXPECT(ENGRAFT_OK, engraft_slot_create(&slot));
  EXPECT(ENGRAFT_MISUSE, engraft_session_follow(session, NULL));
  EXPECT(ENGRAFT_OK, engraft_session_follow(session, slot));
  CHECK(strcmp(base.text, generate(session, prompt, 0).text) == 0);
  EXPECT(ENGRAFT_OK, engraft_slot_swap(slot, adapter, &generation));
  CHECK(generation == 1);
  CHECK(strcmp(tuned.text, generate(session, prompt, 0).text) == 0);
  EXPECT(ENGRAFT_OK, engraft_slot_swap(slot, NULL, NULL));
  EXPECT(ENGRAFT_MISUSE, engraft_slot_swap(NULL, adapter, NULL));
  EXPECT(ENGRAFT_OK, engraft_slot_free(slot));
  EXPECT(ENGRAFT_MISUSE, engraft_slot_swap(slot, adapter, NULL));
  /* The session has its share of the slot still; a trim takes the cache alone. */
  EXPECT(ENGRAFT_OK, engraft_session_trim(session));
  CHECK(strcmp(base.text, generate(session, prompt, 0).text) == 0);
  generate(session, "And in the kitchen?", 1);
  EXPECT(ENGRAFT_OK, engraft_session_reset(session));

  heard stopped = {.session = session, .stop_after = 2};
  engraft_generate_info info = {.struct_size = sizeof info};
  int32_t code = engraft_session_generate(session, TEXT("Once"), NULL, on_text, &stopped, &info);
  EXPECT(ENGRAFT_CANCELLED, code);
  CHECK(info.ended == ENGRAFT_ENDED_CANCELLED && stopped.parts == 2);
  heard meddled = {.session = session, .meddle = true};
  code = engraft_session_generate(session, TEXT("Once"), NULL, on_text, &meddled, &info);
  EXPECT(ENGRAFT_CANCELLED, code);
  CHECK(info.ended == ENGRAFT_ENDED_CANCELLED && !meddled.meddle);
  /* Without a call that runs there is nothing to stop. */
  EXPECT(ENGRAFT_OK, engraft_session_cancel(session));
  generate(session, prompt, 0);
  engraft_generate_params wild;
  EXPECT(ENGRAFT_OK, engraft_generate_default_params(&wild, sizeof wild));
  wild.top_p = 7;
  EXPECT(ENGRAFT_MISUSE, engraft_session_generate(session, TEXT("x"), &wild, NULL, NULL, NULL));
  EXPECT(ENGRAFT_MISUSE, engraft_session_generate(session, NULL, 3, NULL, NULL, NULL, NULL));
  EXPECT(ENGRAFT_OK, engraft_session_free(session));
  EXPECT(ENGRAFT_MISUSE, engraft_session_generate(session, TEXT("x"), NULL, NULL, NULL, NULL));
}

/* ---- The store and the gate ------------------------------------------------------------------- */

static void test_store(const world *w, engraft_adapter *adapter)
{
  engraft_store *store = NULL;
  engraft_store_params params;
  engraft_generation_info info = {.struct_size = sizeof info};
  uint64_t number = 0;
  EXPECT(ENGRAFT_OK, engraft_store_default_params(&params, sizeof params));
  params.must_exist = 1;
  EXPECT(ENGRAFT_MISUSE, engraft_store_open(TEXT(within(w, "store")), &params, &store));
  EXPECT(ENGRAFT_OK, engraft_store_open(TEXT(within(w, "store")), NULL, &store));
  EXPECT(ENGRAFT_OK, engraft_store_active(store, &info));
  CHECK(info.kind == 0 && info.number == 0);
  EXPECT(ENGRAFT_MISUSE, engraft_store_rollback(store, &number));
  EXPECT(ENGRAFT_MISUSE, engraft_store_promote_adapter(store, adapter, NULL, 0, &number));
  EXPECT(ENGRAFT_OK, engraft_store_promote_adapter(store, adapter, TEXT("a test"), &number));
  CHECK(number == 1);
  EXPECT(ENGRAFT_OK, engraft_store_promote_adapter(store, adapter, TEXT("another"), &number));
  EXPECT(ENGRAFT_OK, engraft_store_active(store, &info));
  CHECK(info.kind == ENGRAFT_KIND_ADAPTER && info.number == 2 && info.previous == 1 && info.bytes > 0);
  engraft_adapter *active = NULL;
  EXPECT(ENGRAFT_OK, engraft_store_load(store, w->model, NULL, &active));
  EXPECT(ENGRAFT_OK, engraft_adapter_free(active));
  EXPECT(ENGRAFT_OK, engraft_store_rollback(store, &number));
  CHECK(number == 1);
  EXPECT(ENGRAFT_OK, engraft_store_activate(store, 2));
  EXPECT(ENGRAFT_MISUSE, engraft_store_activate(store, 9));
  EXPECT(ENGRAFT_MISUSE, engraft_store_prune(store, 0, &number));
  EXPECT(ENGRAFT_OK, engraft_store_prune(store, 1, &number));
  char list[1024] = "";
  EXPECT(ENGRAFT_OK, engraft_store_list(store, list, sizeof list, NULL));
  CHECK(strstr(list, "\"active\":2") != NULL);
  EXPECT(ENGRAFT_OK, engraft_store_free(store));
  EXPECT(ENGRAFT_MISUSE, engraft_store_active(store, &info));
}

static bool on_arm(const engraft_progress *progress, void *user)
{
  CHECK(progress->event != ENGRAFT_EVENT_NOTE || progress->text_length > 0);
  return --*(int *)user != 0;
}

/* The store holds what is in use, and the gate compares it, too. */
static void test_gate(const world *w, engraft_adapter *in_use)
{
  engraft_gate *gate = NULL;
  engraft_store *store = NULL;
  uint64_t number = 0;
  EXPECT(ENGRAFT_OK, engraft_store_open(TEXT(within(w, "judged")), NULL, &store));
  EXPECT(ENGRAFT_OK, engraft_store_promote_adapter(store, in_use, TEXT("a test"), &number));
  engraft_gate_params params;
  EXPECT(ENGRAFT_OK, engraft_gate_default_params(&params, sizeof params));
  params.arms = ENGRAFT_ARM_FEW_SHOT | ENGRAFT_ARM_LORA;
  params.shots = 1;
  params.steps = 8;
  params.rank = 2;
  params.learning_rate = 2e-3;
  params.answer_tokens = 8;
  params.resamples = 200;
  params.threads = THREADS;
  params.protect_off = 2;
  EXPECT(ENGRAFT_MISUSE, engraft_gate_create(w->model, w->data, &params, &gate));
  params.protect_off = 0;
  params.store = store;
  params.retention = "%% letter\nDear neighbour, the keys lie under the mat.\n%% note\nBuy bread.\n";
  params.retention_length = strlen(params.retention);
#ifdef BRIEF
  params.no_built_in_retention = 1;
  params.protect_off = 1;
  params.evaluations = 1;
  params.steps = 2;
#endif
  EXPECT(ENGRAFT_MISUSE, engraft_gate_create(w->model, NULL, &params, &gate));
  EXPECT(ENGRAFT_OK, engraft_gate_create(w->model, w->data, &params, &gate));
  uint32_t decision = 99;
  char arm[64], *verdict = NULL;
  size_t length = 0;
  EXPECT(ENGRAFT_OK, engraft_gate_decision(gate, &decision, arm, sizeof arm, NULL));
  CHECK(decision == ENGRAFT_DECISION_NONE);
  EXPECT(ENGRAFT_MISUSE, engraft_gate_verdict(gate, NULL, 0, &length));
  int events = 2;
  EXPECT(ENGRAFT_CANCELLED, engraft_gate_run(gate, on_arm, &events));
  EXPECT(ENGRAFT_OK, engraft_gate_cancel(gate));
  EXPECT(ENGRAFT_CANCELLED, engraft_gate_run(gate, NULL, NULL));
  EXPECT(ENGRAFT_OK, engraft_gate_resume(gate));
  events = -1;
  EXPECT(ENGRAFT_OK, engraft_gate_run(gate, on_arm, &events));
  EXPECT(ENGRAFT_OK, engraft_gate_decision(gate, &decision, arm, sizeof arm, NULL));
  CHECK(decision != ENGRAFT_DECISION_NONE);
  EXPECT(ENGRAFT_OK, engraft_gate_verdict(gate, NULL, 0, &length));
  verdict = calloc(length + 1, 1);
  EXPECT(ENGRAFT_TOO_SMALL, engraft_gate_verdict(gate, verdict, length, NULL));
  EXPECT(ENGRAFT_OK, engraft_gate_verdict(gate, verdict, length + 1, NULL));
  CHECK(verdict[0] == '{' && strstr(verdict, "\"decision\"") != NULL && strstr(verdict, "\"own\"") != NULL);
  CHECK(strstr(verdict, "\"generation 1\"") != NULL);
  free(verdict);
  EXPECT(ENGRAFT_OK, engraft_gate_report(gate, NULL, 0, &length));

  engraft_adapter *won = NULL;
  bool stays = decision == ENGRAFT_DECISION_KEEP_BASE || decision == ENGRAFT_DECISION_KEEP_ACTIVE;
  CHECK((decision == ENGRAFT_DECISION_KEEP_ACTIVE) == (strcmp(arm, "generation 1") == 0));
  int32_t wanted = stays ? ENGRAFT_GATE_REFUSED : ENGRAFT_OK;
  EXPECT(ENGRAFT_MISUSE, engraft_store_promote(store, NULL, &number));
  EXPECT(wanted, engraft_store_promote(store, gate, &number));
  EXPECT(wanted, engraft_gate_adapter(gate, &won));
  CHECK((won != NULL) == (wanted == ENGRAFT_OK));
  EXPECT(ENGRAFT_OK, engraft_adapter_free(won));
  EXPECT(ENGRAFT_OK, engraft_gate_free(gate));
  EXPECT(ENGRAFT_OK, engraft_store_free(store));
  printf("gate: decision %" PRIu32 " %s\n", decision, arm);
}

/* ---- Panics ----------------------------------------------------------------------------------- */

#ifdef PANIC_INJECTION
int32_t engraft_inject_panic(const char *name, size_t length);

static void test_panics(const world *w)
{
  engraft_model *model = NULL;
  engraft_model_info info = {.struct_size = sizeof info};
  char text[256];
  EXPECT(ENGRAFT_OK, engraft_inject_panic(TEXT("engraft_model_open")));
  EXPECT(ENGRAFT_PANIC, engraft_model_open(TEXT(w->model_path), NULL, &model));
  EXPECT(ENGRAFT_OK, engraft_model_open(TEXT(w->model_path), NULL, &model));
  EXPECT(ENGRAFT_OK, engraft_inject_panic(TEXT("engraft_model_get_info")));
  EXPECT(ENGRAFT_PANIC, engraft_model_get_info(model, &info));
  EXPECT(ENGRAFT_OK, engraft_message(model, text, sizeof text, NULL));
  CHECK(strstr(text, "handle.rs") != NULL);
  /* Poisoned for good, and it can be freed. */
  EXPECT(ENGRAFT_PANIC, engraft_model_get_info(model, &info));
  EXPECT(ENGRAFT_PANIC, engraft_model_trim(model));
  EXPECT(ENGRAFT_OK, engraft_model_free(model));
}
#endif

/* What tools must find: the library is told of more room than there is. */
#ifdef BROKEN
static void overrun(void)
{
  char *small = malloc(2);
  engraft_version(small, 64, NULL);
  free(small);
}
#endif

int main(int count, char **arguments)
{
  if (count != 4) {
    fprintf(stderr, "usage: smoke MODEL.gguf TRAIN.jsonl FOLDER\n");
    return 2;
  }
  world w = {.model_path = arguments[1], .folder = arguments[3]};
  w.rows = read_file(arguments[2], &w.rows_length);
  if (!w.rows) {
    fprintf(stderr, "%s: can't be read\n", arguments[2]);
    return 2;
  }
#ifdef BROKEN
  overrun();
#endif
  w.rows_length = of_rows(w.rows, w.rows_length, ROWS);
  test_versions();
  test_model(&w);
  test_structs(&w);
  test_data(&w);
  test_plan(&w);
  engraft_trainer *trainer = test_trainer(&w);

  engraft_adapter *trained = NULL, *loaded = NULL;
  EXPECT(ENGRAFT_OK, engraft_trainer_adapter(trainer, &trained));
  EXPECT(ENGRAFT_OK, engraft_trainer_free(trainer));
  EXPECT(ENGRAFT_IO, engraft_adapter_load(w.model, TEXT(within(&w, "nothing")), NULL, &loaded));
  EXPECT(ENGRAFT_CORRUPT, engraft_adapter_load(w.model, TEXT(w.model_path), NULL, &loaded));
  EXPECT(ENGRAFT_OK, engraft_adapter_load(w.model, TEXT(within(&w, "adapter")), NULL, &loaded));
  engraft_adapter_info info = {.struct_size = sizeof info};
  EXPECT(ENGRAFT_OK, engraft_adapter_get_info(loaded, &info));
  CHECK(info.kind == ENGRAFT_KIND_ADAPTER && info.rank == 8 && info.steps == STEPS);
  EXPECT(ENGRAFT_OK, engraft_adapter_save(loaded, TEXT(within(&w, "half")), 1));
  test_session(&w, loaded);
  test_store(&w, trained);
  test_gate(&w, trained);
  EXPECT(ENGRAFT_OK, engraft_adapter_free(trained));
  EXPECT(ENGRAFT_OK, engraft_adapter_free(loaded));
#ifdef PANIC_INJECTION
  test_panics(&w);
#endif
  /* A model may be freed before what was made of it. */
  EXPECT(ENGRAFT_OK, engraft_model_free(w.model));
  EXPECT(ENGRAFT_OK, engraft_data_free(w.data));
  EXPECT(ENGRAFT_OK, engraft_log_set(NULL, NULL, ENGRAFT_LOG_NONE));
  free(w.rows);
  CHECK(lines_logged > 0);
  printf("%d lines logged, %d checks failed\n", lines_logged, failures);
  return failures == 0 ? 0 : 1;
}
