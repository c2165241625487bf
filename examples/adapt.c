/*
 * An adapter's whole life in C: plan, train, save, and answer one question with it.
 *
 *   cc -Itargets/capi/include examples/adapt.c libengraft.a -lpthread -lm -ldl -o adapt
 *   ./adapt MODEL.gguf ROWS.jsonl FOLDER "a question"
 *
 * The adapter is saved as FOLDER/adapter.engraft. targets/capi/README.md says how to build libengraft.a.
 */
#include <engraft.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* If a call failed, prints the library's message for the handle and exits. */
static void need(int32_t code, const void *handle)
{
  if (code == ENGRAFT_OK)
    return;
  char message[1024] = "";
  engraft_message(handle, message, sizeof message, NULL);
  fprintf(stderr, "error %" PRId32 ": %s\n", code, message);
  exit(1);
}

static bool on_progress(const engraft_progress *progress, void *user)
{
  (void)user;
  if (progress->event == ENGRAFT_EVENT_STEP && progress->step % 10 == 0)
    fprintf(stderr, "step %" PRIu64 "/%" PRIu64 "  loss %.4f\n", progress->step, progress->steps, progress->loss);
  return true;
}

static bool on_text(const char *text, size_t length, void *user)
{
  (void)user;
  return fwrite(text, 1, length, stdout) == length;
}

int main(int count, char **arguments)
{
  if (count != 5) {
    fprintf(stderr, "usage: adapt MODEL.gguf ROWS.jsonl FOLDER QUESTION\n");
    return 2;
  }
  const char *path = arguments[1], *rows = arguments[2], *folder = arguments[3], *question = arguments[4];
  engraft_model *model = NULL;
  engraft_data *data = NULL;
  engraft_plan *plan = NULL;
  engraft_trainer *trainer = NULL;
  engraft_adapter *adapter = NULL;
  engraft_session *session = NULL;
  need(engraft_model_open(path, strlen(path), NULL, &model), NULL);
  need(engraft_data_open(model, rows, strlen(rows), NULL, &data), model);

  engraft_train_params training;
  need(engraft_train_default_params(&training, sizeof training), NULL);
  training.steps = 30;
  training.batch_size = 8;
  engraft_plan_info planned = {.struct_size = sizeof planned};
  need(engraft_plan_create(model, data, &training, &plan), model);
  need(engraft_plan_get_info(plan, &planned), plan);
  fprintf(stderr, "%" PRIu64 " bytes of private memory planned\n", planned.private_bytes);

  need(engraft_trainer_create(model, data, &training, &trainer), model);
  need(engraft_trainer_run(trainer, 0, on_progress, NULL), trainer);
  need(engraft_trainer_adapter(trainer, &adapter), trainer);
  need(engraft_adapter_save(adapter, folder, strlen(folder), 0), adapter);

  engraft_generate_params asking;
  need(engraft_generate_default_params(&asking, sizeof asking), NULL);
  asking.prompting = ENGRAFT_PROMPT_CHAT;
  asking.greedy = 1;
  need(engraft_session_create(model, adapter, NULL, &session), model);
  need(engraft_session_generate(session, question, strlen(question), &asking, on_text, NULL, NULL), session);
  putchar('\n');

  engraft_session_free(session);
  engraft_adapter_free(adapter);
  engraft_trainer_free(trainer);
  engraft_plan_free(plan);
  engraft_data_free(data);
  engraft_model_free(model);
  return 0;
}
