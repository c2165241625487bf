/*
 * The native side of dev.engraft. Each function passes its arguments to the engraft.h function of the same name, and
 * the result back to Java. It decides nothing.
 *
 * - Handles are the library's numbers (never addresses), passed as jlong.
 * - Texts are passed as UTF-8 byte arrays, because JNI's strings use another encoding.
 * - A negative code becomes an EngraftException. An exception from a listener ends the call and is rethrown once the
 *   call has returned; it is never pending while the library runs.
 *
 * `javac -h` makes engraft_native.h from Native.java (see build-jni.sh), so that the compiler checks the two sides
 * against each other.
 */
#include "engraft.h"
#include "engraft_native.h"

#include <stdlib.h>
#include <string.h>

#define NATIVE(type, name) JNIEXPORT type JNICALL Java_dev_engraft_Native_##name

/* A handle of the library's type TYPE. */
#define HANDLE(type, number) ((engraft_##type *)(intptr_t)(number))

/* ---- Looked up once --------------------------------------------------------------------------- */

static JavaVM *machine;
static struct {
  jclass exception, progress, engraft;
  jmethodID exception_new, progress_new, log, on_progress, on_text;
} java;

static jclass find_class(JNIEnv *env, const char *name)
{
  jclass local = (*env)->FindClass(env, name);
  jclass global = local ? (*env)->NewGlobalRef(env, local) : NULL;
  if (local)
    (*env)->DeleteLocalRef(env, local);
  return global;
}

/* A method of an interface. Its id outlives the reference to its class, which is never unloaded before us. */
static jmethodID find_method(JNIEnv *env, const char *name, const char *method, const char *signature)
{
  jclass local = (*env)->FindClass(env, name);
  jmethodID id = local ? (*env)->GetMethodID(env, local, method, signature) : NULL;
  if (local)
    (*env)->DeleteLocalRef(env, local);
  return id;
}

static bool find_java(JNIEnv *env)
{
  return (java.exception = find_class(env, "dev/engraft/EngraftException")) &&
         (java.progress = find_class(env, "dev/engraft/Progress")) &&
         (java.engraft = find_class(env, "dev/engraft/Engraft")) &&
         (java.exception_new = (*env)->GetMethodID(env, java.exception, "<init>", "(I[B)V")) &&
         (java.progress_new = (*env)->GetMethodID(env, java.progress, "<init>", "(IJJJDDDDDD[B)V")) &&
         (java.log = (*env)->GetStaticMethodID(env, java.engraft, "log", "(I[B)V")) &&
         (java.on_progress = find_method(env, "dev/engraft/ProgressListener", "onProgress",
                                         "(Ldev/engraft/Progress;)Z")) &&
         (java.on_text = find_method(env, "dev/engraft/Native$TextSink", "onText", "([B)Z"));
}

JNIEXPORT jint JNICALL JNI_OnLoad(JavaVM *vm, void *reserved)
{
  (void)reserved;
  JNIEnv *env = NULL;
  machine = vm;
  if ((*vm)->GetEnv(vm, (void **)&env, JNI_VERSION_1_6) != JNI_OK)
    return JNI_ERR;
  uint32_t found = engraft_abi_version();
  if (found >> 16 != ENGRAFT_ABI_VERSION >> 16 || found < ENGRAFT_ABI_VERSION) {
    jclass error = (*env)->FindClass(env, "java/lang/UnsatisfiedLinkError");
    if (error)
      (*env)->ThrowNew(env, error, "libengraft.so and libengraft_jni.so differ in version: take both from one build");
    return JNI_ERR;
  }
  return find_java(env) ? JNI_VERSION_1_6 : JNI_ERR;
}

/* ---- Bytes, codes and exceptions -------------------------------------------------------------- */

static jbyteArray to_bytes(JNIEnv *env, const void *bytes, size_t length)
{
  jbyteArray array = length <= INT32_MAX ? (*env)->NewByteArray(env, (jsize)length) : NULL;
  if (array)
    (*env)->SetByteArrayRegion(env, array, 0, (jsize)length, bytes);
  return array;
}

/* The bytes of an array while a call runs. */
typedef struct {
  jbyteArray array;
  jbyte *bytes;
  size_t length;
} borrowed;

/* False with an exception pending. NULL is borrowed as NULL. */
static bool borrow(JNIEnv *env, jbyteArray array, borrowed *out)
{
  *out = (borrowed){.array = array};
  if (!array)
    return true;
  out->length = (size_t)(*env)->GetArrayLength(env, array);
  out->bytes = (*env)->GetByteArrayElements(env, array, NULL);
  return out->bytes != NULL;
}

static void give_back(JNIEnv *env, const borrowed *text)
{
  if (text->bytes)
    (*env)->ReleaseByteArrayElements(env, text->array, text->bytes, JNI_ABORT);
}

/* The exception that a listener threw during this thread's current call: a global reference, or NULL. */
static _Thread_local jthrowable thrown;

/* Keeps the pending exception; the first one if there are several. */
static void keep_exception(JNIEnv *env)
{
  jthrowable pending = (*env)->ExceptionOccurred(env);
  if (!pending)
    return;
  (*env)->ExceptionClear(env);
  if (!thrown)
    thrown = (*env)->NewGlobalRef(env, pending);
  (*env)->DeleteLocalRef(env, pending);
}

static void throw_code(JNIEnv *env, int32_t code, const char *message, size_t length)
{
  jbyteArray text = to_bytes(env, message, length);
  jobject exception = text ? (*env)->NewObject(env, java.exception, java.exception_new, (jint)code, text) : NULL;
  if (exception)
    (*env)->Throw(env, exception);
}

/* Ends a call: true for OK; otherwise an exception is pending. */
static bool finish(JNIEnv *env, int32_t code)
{
  if (thrown) {
    jthrowable first = (*env)->NewLocalRef(env, thrown);
    (*env)->DeleteGlobalRef(env, thrown);
    thrown = NULL;
    (*env)->Throw(env, first);
    return false;
  }
  if (code == ENGRAFT_OK)
    return true;
  char message[2048] = "";
  size_t length = 0;
  if (engraft_message(NULL, message, sizeof message, &length) == ENGRAFT_TOO_SMALL) {
    /* `length` is the whole text's. The library cuts between characters, up to three bytes before the end; NULs
     * from there on are the buffer's, and NULs within are the text's. */
    for (length = sizeof message - 1; length > 0 && message[length - 1] == 0;)
      length--;
  }
  throw_code(env, code, message, length);
  return false;
}

/* Java has no unsigned numbers, and a 32-bit size_t would drop the upper half of a long. Values that the library
 * can't take are refused here with its code. False with an exception pending. */
#define FITS(env, number, most) \
  fits(env, number, most, #number " is negative, or more than the library counts on this machine")

static bool fits(JNIEnv *env, jlong number, uint64_t most, const char *message)
{
  if (number >= 0 && (uint64_t)number <= most)
    return true;
  throw_code(env, ENGRAFT_MISUSE, message, strlen(message));
  return false;
}

/* Ends a function that made a handle; frees the handle if nobody will get it. */
#define MADE(env, code, type, handle)                  \
  do {                                                 \
    if (!finish(env, code)) {                          \
      engraft_##type##_free(handle);                   \
      return 0;                                        \
    }                                                  \
    return (jlong)(intptr_t)(handle);                  \
  } while (0)

/* Ends a function that copies a text: asks for its length, then for the text. */
#define COPIED(env, function, ...)                                   \
  do {                                                               \
    size_t length = 0;                                               \
    int32_t code = function(__VA_ARGS__, NULL, 0, &length);          \
    char *buffer = code == ENGRAFT_OK ? malloc(length + 1) : NULL;   \
    if (buffer)                                                      \
      code = function(__VA_ARGS__, buffer, length + 1, &length);     \
    return copied(env, code, buffer, length);                        \
  } while (0)

static jbyteArray copied(JNIEnv *env, int32_t code, char *buffer, size_t length)
{
  jbyteArray array = NULL;
  if (finish(env, code)) {
    jclass error = buffer ? NULL : (*env)->FindClass(env, "java/lang/OutOfMemoryError");
    if (buffer)
      array = to_bytes(env, buffer, length);
    else if (error)
      (*env)->ThrowNew(env, error, "no memory for a text of the library");
  }
  free(buffer);
  return array;
}

/* ---- Structs ---------------------------------------------------------------------------------- */

typedef enum { INT, LONG, FLOAT, DOUBLE, FLAG } kind;

/* A struct's member and the corresponding field of a Java object. */
typedef struct {
  const char *name;
  kind kind;
  size_t offset;
} field;

/* Whether a struct's member is of a kind; a wrong kind would read past the value or the struct. */
#define IS_INT(member) _Generic((member), uint32_t: 1, int32_t: 1, default: 0)
#define IS_FLAG(member) _Generic((member), uint32_t: 1, default: 0)
#define IS_LONG(member) _Generic((member), uint64_t: 1, default: 0)
#define IS_FLOAT(member) _Generic((member), float: 1, default: 0)
#define IS_DOUBLE(member) _Generic((member), double: 1, default: 0)

/* 0, or a compile error if the condition doesn't hold. An initializer has no place for a separate assertion. */
#define ZERO_IF(condition, message)           \
  (0 * sizeof(struct {                        \
     _Static_assert(condition, message);      \
     char unused;                             \
   }))

#define FIELD(type, member, name, kind) \
  {name, kind, \
   offsetof(type, member) + ZERO_IF(IS_##kind(((type *)0)->member), #type "." #member " is not of the kind " #kind)}
#define END {NULL, INT, 0}

static jfieldID find_field(JNIEnv *env, jclass class, const field *f)
{
  static const char *const signatures[] = {[INT] = "I", [LONG] = "J", [FLOAT] = "F", [DOUBLE] = "D", [FLAG] = "Z"};
  return (*env)->GetFieldID(env, class, f->name, signatures[f->kind]);
}

static void read_field(JNIEnv *env, jobject object, jfieldID id, kind kind, char *place)
{
  int32_t number;
  int64_t large;
  float single;
  double twice;
  switch (kind) {
  case INT: number = (*env)->GetIntField(env, object, id), memcpy(place, &number, sizeof number); break;
  case FLAG: number = (*env)->GetBooleanField(env, object, id) != 0, memcpy(place, &number, sizeof number); break;
  case LONG: large = (*env)->GetLongField(env, object, id), memcpy(place, &large, sizeof large); break;
  case FLOAT: single = (*env)->GetFloatField(env, object, id), memcpy(place, &single, sizeof single); break;
  case DOUBLE: twice = (*env)->GetDoubleField(env, object, id), memcpy(place, &twice, sizeof twice); break;
  }
}

static void write_field(JNIEnv *env, jobject object, jfieldID id, kind kind, const char *place)
{
  int32_t number;
  int64_t large;
  float single;
  double twice;
  switch (kind) {
  case INT: memcpy(&number, place, sizeof number), (*env)->SetIntField(env, object, id, number); break;
  case FLAG: memcpy(&number, place, sizeof number), (*env)->SetBooleanField(env, object, id, number != 0); break;
  case LONG: memcpy(&large, place, sizeof large), (*env)->SetLongField(env, object, id, large); break;
  case FLOAT: memcpy(&single, place, sizeof single), (*env)->SetFloatField(env, object, id, single); break;
  case DOUBLE: memcpy(&twice, place, sizeof twice), (*env)->SetDoubleField(env, object, id, twice); break;
  }
}

/* Reads the fields into a struct of defaults, or with `into` NULL writes them from `from`. Does nothing for a NULL
 * object. False with an exception pending. */
static bool exchange(JNIEnv *env, jobject object, const field *fields, void *into, const void *from)
{
  if (!object)
    return true;
  jclass class = (*env)->GetObjectClass(env, object);
  bool found = class != NULL;
  for (const field *f = fields; found && f->name; f++) {
    jfieldID id = find_field(env, class, f);
    found = id != NULL;
    if (found && into)
      read_field(env, object, id, f->kind, (char *)into + f->offset);
    else if (found)
      write_field(env, object, id, f->kind, (const char *)from + f->offset);
  }
  if (class)
    (*env)->DeleteLocalRef(env, class);
  return found;
}

/* Sets `params` to its type's defaults and reads the object's fields into it. */
#define READ(env, type, fields, object, params)                                   \
  (finish(env, engraft_##type##_default_params(&(params), sizeof(params))) &&     \
   exchange(env, object, fields, &(params), NULL))

#define WRITE(env, fields, object, info) exchange(env, object, fields, NULL, &(info))

/* ---- Listeners -------------------------------------------------------------------------------- */

/* Local references for one call of a listener: its arguments, and those for making them. */
#define LISTENER_REFERENCES 8

/* A call with a listener; both belong to the calling thread. */
typedef struct {
  JNIEnv *env;
  jobject listener;
} call;

static jobject new_progress(JNIEnv *env, const engraft_progress *p)
{
  jbyteArray text = p->text ? to_bytes(env, p->text, p->text_length) : NULL;
  if (p->text && !text)
    return NULL;
  return (*env)->NewObject(env, java.progress, java.progress_new, (jint)p->event, (jlong)p->step, (jlong)p->steps,
                           (jlong)p->tokens, p->loss, p->valid_loss, p->learning_rate, p->grad_norm,
                           p->tokens_per_s, p->seconds, text);
}

/* Calls a listener's method with one argument, in a frame that frees its references afterwards. */
static bool tell(call *to, jmethodID method, jobject (*argument)(JNIEnv *, const void *), const void *of)
{
  JNIEnv *env = to->env;
  jboolean go_on = JNI_FALSE;
  /* A log listener may have thrown meanwhile. It couldn't cancel the call then, but here we can. */
  if (thrown)
    return false;
#ifndef LEAKY
  if ((*env)->PushLocalFrame(env, LISTENER_REFERENCES) != 0) {
    keep_exception(env);
    return false;
  }
#endif
  jobject object = argument(env, of);
  if (object)
    go_on = (*env)->CallBooleanMethod(env, to->listener, method, object);
  if ((*env)->ExceptionCheck(env)) {
    keep_exception(env);
    go_on = JNI_FALSE;
  }
#ifndef LEAKY
  (*env)->PopLocalFrame(env, NULL);
#endif
  return go_on && !thrown;
}

static jobject progress_argument(JNIEnv *env, const void *of)
{
  return new_progress(env, of);
}

static bool on_progress(const engraft_progress *progress, void *user)
{
  return tell(user, java.on_progress, progress_argument, progress);
}

typedef struct {
  const char *bytes;
  size_t length;
} part;

static jobject text_argument(JNIEnv *env, const void *of)
{
  const part *text = of;
  return to_bytes(env, text->bytes, text->length);
}

static bool on_text(const char *text, size_t length, void *user)
{
  part all = {text, length};
  return tell(user, java.on_text, text_argument, &all);
}

/* The library's threads know nothing of Java, so they are attached for the line. Nobody could catch an exception on
 * them, so it is printed. */
static void on_log(int32_t level, const char *text, size_t length, void *user)
{
  (void)user;
  JNIEnv *env = NULL;
  bool ours = (*machine)->GetEnv(machine, (void **)&env, JNI_VERSION_1_6) == JNI_OK;
#ifdef __ANDROID__
  if (!ours && (*machine)->AttachCurrentThread(machine, &env, NULL) != JNI_OK)
    return;
#else
  if (!ours && (*machine)->AttachCurrentThread(machine, (void **)&env, NULL) != JNI_OK)
    return;
#endif
  if (ours && (thrown || (*env)->ExceptionCheck(env)))
    return;
  if ((*env)->PushLocalFrame(env, LISTENER_REFERENCES) == 0) {
    jbyteArray line = to_bytes(env, text, length);
    if (line)
      (*env)->CallStaticVoidMethod(env, java.engraft, java.log, (jint)level, line);
    if (!ours && (*env)->ExceptionCheck(env)) {
      (*env)->ExceptionDescribe(env);
      (*env)->ExceptionClear(env);
    }
    keep_exception(env);
    (*env)->PopLocalFrame(env, NULL);
  } else {
    (*env)->ExceptionClear(env);
  }
  if (!ours)
    (*machine)->DetachCurrentThread(machine);
}

/* ---- The library ------------------------------------------------------------------------------ */

NATIVE(jbyteArray, version)(JNIEnv *env, jclass class)
{
  (void)class;
  char text[64] = "";
  return finish(env, engraft_version(text, sizeof text, NULL)) ? to_bytes(env, text, strlen(text)) : NULL;
}

NATIVE(jbyteArray, codeName)(JNIEnv *env, jclass class, jint code)
{
  (void)class;
  const char *name = engraft_code_name(code);
  return to_bytes(env, name, strlen(name));
}

NATIVE(void, logSet)(JNIEnv *env, jclass class, jint level)
{
  (void)class;
  finish(env, engraft_log_set(level == ENGRAFT_LOG_NONE ? NULL : on_log, NULL, level));
}

/* ---- Models ----------------------------------------------------------------------------------- */

static const field model_info[] = {
  FIELD(engraft_model_info, vocab, "vocab", INT),
  FIELD(engraft_model_info, d_model, "dModel", INT),
  FIELD(engraft_model_info, n_layers, "nLayers", INT),
  FIELD(engraft_model_info, n_heads, "nHeads", INT),
  FIELD(engraft_model_info, n_kv_heads, "nKvHeads", INT),
  FIELD(engraft_model_info, d_ff, "dFf", INT),
  FIELD(engraft_model_info, context_length, "contextLength", INT),
  FIELD(engraft_model_info, parameters, "parameters", LONG),
  FIELD(engraft_model_info, mapped_bytes, "mappedBytes", LONG),
  FIELD(engraft_model_info, private_bytes, "privateBytes", LONG),
  FIELD(engraft_model_info, tokenizer_bytes, "tokenizerBytes", LONG),
  END,
};

NATIVE(jlong, modelOpen)(JNIEnv *env, jclass class, jbyteArray path, jboolean no_mmap, jbyteArray digest_cache)
{
  (void)class;
  engraft_model *model = NULL;
  engraft_model_params params;
  borrowed file, cache;
  if (!finish(env, engraft_model_default_params(&params, sizeof params)) || !borrow(env, path, &file))
    return 0;
  if (!borrow(env, digest_cache, &cache)) {
    give_back(env, &file);
    return 0;
  }
  params.no_mmap = no_mmap != 0;
  params.digest_cache = (const char *)cache.bytes;
  params.digest_cache_length = cache.length;
  int32_t code = engraft_model_open((const char *)file.bytes, file.length, &params, &model);
  give_back(env, &cache);
  give_back(env, &file);
  MADE(env, code, model, model);
}

NATIVE(void, modelFree)(JNIEnv *env, jclass class, jlong model)
{
  (void)class;
  finish(env, engraft_model_free(HANDLE(model, model)));
}

NATIVE(void, modelInfo)(JNIEnv *env, jclass class, jlong model, jobject object)
{
  (void)class;
  engraft_model_info info = {.struct_size = sizeof info};
  if (finish(env, engraft_model_get_info(HANDLE(model, model), &info)))
    WRITE(env, model_info, object, info);
}

NATIVE(jbyteArray, modelName)(JNIEnv *env, jclass class, jlong model)
{
  (void)class;
  COPIED(env, engraft_model_name, HANDLE(model, model));
}

NATIVE(jbyteArray, modelDigest)(JNIEnv *env, jclass class, jlong model)
{
  (void)class;
  uint8_t digest[32];
  return finish(env, engraft_model_digest(HANDLE(model, model), digest)) ? to_bytes(env, digest, sizeof digest) : NULL;
}

NATIVE(void, modelTrim)(JNIEnv *env, jclass class, jlong model)
{
  (void)class;
  finish(env, engraft_model_trim(HANDLE(model, model)));
}

/* ---- Data ------------------------------------------------------------------------------------- */

static const field data_params[] = {
  FIELD(engraft_data_params, max_seq_length, "maxSeqLength", INT),
  FIELD(engraft_data_params, no_mask_prompt, "noMaskPrompt", FLAG),
  FIELD(engraft_data_params, raw, "raw", FLAG),
  FIELD(engraft_data_params, task, "task", INT),
  FIELD(engraft_data_params, valid_fraction, "validFraction", DOUBLE),
  FIELD(engraft_data_params, split_seed, "splitSeed", LONG),
  END,
};

static const field data_info[] = {
  FIELD(engraft_data_info, split_by_seed, "splitBySeed", FLAG),
  FIELD(engraft_data_info, train_rows, "trainRows", LONG),
  FIELD(engraft_data_info, train_tokens, "trainTokens", LONG),
  FIELD(engraft_data_info, valid_rows, "validRows", LONG),
  FIELD(engraft_data_info, valid_tokens, "validTokens", LONG),
  FIELD(engraft_data_info, skipped, "skipped", LONG),
  FIELD(engraft_data_info, truncated, "truncated", LONG),
  FIELD(engraft_data_info, duplicates, "duplicates", LONG),
  FIELD(engraft_data_info, rows_max, "rowsMax", LONG),
  END,
};

NATIVE(jlong, dataOpen)(JNIEnv *env, jclass class, jlong model, jbyteArray path, jobject settings)
{
  (void)class;
  engraft_data *data = NULL;
  engraft_data_params params;
  borrowed text;
  if (!READ(env, data, data_params, settings, params) || !borrow(env, path, &text))
    return 0;
  int32_t code = engraft_data_open(HANDLE(model, model), (const char *)text.bytes, text.length, &params, &data);
  give_back(env, &text);
  MADE(env, code, data, data);
}

NATIVE(jlong, dataFromMemory)(JNIEnv *env, jclass class, jlong model, jbyteArray train, jbyteArray valid,
                              jbyteArray test, jobject settings)
{
  (void)class;
  engraft_data *data = NULL;
  engraft_data_params params;
  jbyteArray arrays[3] = {train, valid, test};
  borrowed rows[3] = {{0}};
  if (!READ(env, data, data_params, settings, params))
    return 0;
  bool all = true;
  for (int i = 0; i < 3 && all; i++)
    all = borrow(env, arrays[i], &rows[i]);
  int32_t code = ENGRAFT_OK;
  if (all)
    code = engraft_data_from_memory(HANDLE(model, model), (const uint8_t *)rows[0].bytes, rows[0].length,
                                    (const uint8_t *)rows[1].bytes, rows[1].length, (const uint8_t *)rows[2].bytes,
                                    rows[2].length, &params, &data);
  for (int i = 0; i < 3; i++)
    give_back(env, &rows[i]);
  if (!all)
    return 0;
  MADE(env, code, data, data);
}

NATIVE(void, dataFree)(JNIEnv *env, jclass class, jlong data)
{
  (void)class;
  finish(env, engraft_data_free(HANDLE(data, data)));
}

NATIVE(void, dataInfo)(JNIEnv *env, jclass class, jlong data, jobject object)
{
  (void)class;
  engraft_data_info info = {.struct_size = sizeof info};
  if (finish(env, engraft_data_get_info(HANDLE(data, data), &info)))
    WRITE(env, data_info, object, info);
}

NATIVE(jbyteArray, dataSkipped)(JNIEnv *env, jclass class, jlong data, jlong index)
{
  (void)class;
  if (!FITS(env, index, SIZE_MAX))
    return NULL;
  COPIED(env, engraft_data_skipped, HANDLE(data, data), (size_t)index);
}

/* ---- Plans ------------------------------------------------------------------------------------ */

static const field train_params[] = {
  FIELD(engraft_train_params, rank, "rank", INT),
  FIELD(engraft_train_params, alpha, "alpha", FLOAT),
  FIELD(engraft_train_params, dropout, "dropout", FLOAT),
  FIELD(engraft_train_params, modules, "modules", INT),
  FIELD(engraft_train_params, num_layers, "numLayers", INT),
  FIELD(engraft_train_params, dora, "dora", FLAG),
  FIELD(engraft_train_params, rslora, "rslora", FLAG),
  FIELD(engraft_train_params, batch_size, "batchSize", INT),
  FIELD(engraft_train_params, grad_accumulation_steps, "gradAccumulationSteps", INT),
  FIELD(engraft_train_params, schedule, "schedule", INT),
  FIELD(engraft_train_params, warmup_steps, "warmupSteps", INT),
  FIELD(engraft_train_params, steps, "steps", LONG),
  FIELD(engraft_train_params, learning_rate, "learningRate", DOUBLE),
  FIELD(engraft_train_params, weight_decay, "weightDecay", DOUBLE),
  FIELD(engraft_train_params, max_grad_norm, "maxGradNorm", DOUBLE),
  FIELD(engraft_train_params, lora_plus_ratio, "loraPlusRatio", DOUBLE),
  FIELD(engraft_train_params, kl_weight, "klWeight", DOUBLE),
  FIELD(engraft_train_params, seed, "seed", LONG),
  FIELD(engraft_train_params, memory_budget, "memoryBudget", LONG),
  FIELD(engraft_train_params, threads, "threads", INT),
  FIELD(engraft_train_params, exact, "exact", FLAG),
  FIELD(engraft_train_params, half, "half", FLAG),
  FIELD(engraft_train_params, replay_count, "replayCount", INT),
  FIELD(engraft_train_params, replay_tokens, "replayTokens", INT),
  FIELD(engraft_train_params, replay_share, "replayShare", DOUBLE),
  FIELD(engraft_train_params, eva_batches, "evaBatches", INT),
  FIELD(engraft_train_params, kl_reverse, "klReverse", FLAG),
  END,
};

static const field plan_info[] = {
  FIELD(engraft_plan_info, fits, "fits", FLAG),
  FIELD(engraft_plan_info, private_bytes, "privateBytes", LONG),
  FIELD(engraft_plan_info, mapped_bytes, "mappedBytes", LONG),
  FIELD(engraft_plan_info, budget_bytes, "budgetBytes", LONG),
  FIELD(engraft_plan_info, pools, "pools", LONG),
  END,
};

NATIVE(jlong, planCreate)(JNIEnv *env, jclass class, jlong model, jlong data, jobject settings, jlong replay)
{
  (void)class;
  engraft_plan *plan = NULL;
  engraft_train_params params;
  if (!READ(env, train, train_params, settings, params))
    return 0;
  params.replay = HANDLE(data, replay);
  int32_t code = engraft_plan_create(HANDLE(model, model), HANDLE(data, data), &params, &plan);
  MADE(env, code, plan, plan);
}

NATIVE(void, planFree)(JNIEnv *env, jclass class, jlong plan)
{
  (void)class;
  finish(env, engraft_plan_free(HANDLE(plan, plan)));
}

NATIVE(void, planInfo)(JNIEnv *env, jclass class, jlong plan, jobject object)
{
  (void)class;
  engraft_plan_info info = {.struct_size = sizeof info};
  if (finish(env, engraft_plan_get_info(HANDLE(plan, plan), &info)))
    WRITE(env, plan_info, object, info);
}

NATIVE(jbyteArray, planPoolName)(JNIEnv *env, jclass class, jlong plan, jlong index)
{
  (void)class;
  char name[256] = "";
  if (!FITS(env, index, SIZE_MAX))
    return NULL;
  int32_t code = engraft_plan_pool(HANDLE(plan, plan), (size_t)index, name, sizeof name, NULL, NULL);
  return finish(env, code) ? to_bytes(env, name, strlen(name)) : NULL;
}

NATIVE(jlong, planPoolBytes)(JNIEnv *env, jclass class, jlong plan, jlong index)
{
  (void)class;
  uint64_t bytes = 0;
  if (FITS(env, index, SIZE_MAX))
    finish(env, engraft_plan_pool(HANDLE(plan, plan), (size_t)index, NULL, 0, NULL, &bytes));
  return (jlong)bytes;
}

NATIVE(jbyteArray, planAdvice)(JNIEnv *env, jclass class, jlong plan)
{
  (void)class;
  COPIED(env, engraft_plan_advice, HANDLE(plan, plan));
}

/* ---- Trainers --------------------------------------------------------------------------------- */

NATIVE(jlong, trainerCreate)(JNIEnv *env, jclass class, jlong model, jlong data, jobject settings, jlong replay)
{
  (void)class;
  engraft_trainer *trainer = NULL;
  engraft_train_params params;
  if (!READ(env, train, train_params, settings, params))
    return 0;
  params.replay = HANDLE(data, replay);
  int32_t code = engraft_trainer_create(HANDLE(model, model), HANDLE(data, data), &params, &trainer);
  MADE(env, code, trainer, trainer);
}

NATIVE(void, trainerFree)(JNIEnv *env, jclass class, jlong trainer)
{
  (void)class;
  finish(env, engraft_trainer_free(HANDLE(trainer, trainer)));
}

NATIVE(jobject, trainerStep)(JNIEnv *env, jclass class, jlong trainer)
{
  (void)class;
  engraft_progress progress = {.struct_size = sizeof progress};
  return finish(env, engraft_trainer_step(HANDLE(trainer, trainer), &progress)) ? new_progress(env, &progress) : NULL;
}

NATIVE(void, trainerRun)(JNIEnv *env, jclass class, jlong trainer, jlong steps, jobject listener)
{
  (void)class;
  call to = {env, listener};
  if (FITS(env, steps, UINT64_MAX))
    finish(env, engraft_trainer_run(HANDLE(trainer, trainer), (uint64_t)steps, listener ? on_progress : NULL, &to));
}

NATIVE(jdouble, trainerEvaluate)(JNIEnv *env, jclass class, jlong trainer)
{
  (void)class;
  double loss = 0;
  finish(env, engraft_trainer_evaluate(HANDLE(trainer, trainer), &loss));
  return loss;
}

NATIVE(jobject, trainerProgress)(JNIEnv *env, jclass class, jlong trainer)
{
  (void)class;
  engraft_progress progress = {.struct_size = sizeof progress};
  int32_t code = engraft_trainer_progress(HANDLE(trainer, trainer), &progress);
  return finish(env, code) ? new_progress(env, &progress) : NULL;
}

NATIVE(void, trainerSave)(JNIEnv *env, jclass class, jlong trainer, jbyteArray folder)
{
  (void)class;
  borrowed text;
  if (!borrow(env, folder, &text))
    return;
  int32_t code = engraft_trainer_save(HANDLE(trainer, trainer), (const char *)text.bytes, text.length);
  give_back(env, &text);
  finish(env, code);
}

NATIVE(void, trainerCheckpoint)(JNIEnv *env, jclass class, jlong trainer, jbyteArray folder)
{
  (void)class;
  borrowed text;
  if (!borrow(env, folder, &text))
    return;
  int32_t code = engraft_trainer_checkpoint(HANDLE(trainer, trainer), (const char *)text.bytes, text.length);
  give_back(env, &text);
  finish(env, code);
}

NATIVE(void, trainerRestore)(JNIEnv *env, jclass class, jlong trainer, jbyteArray folder)
{
  (void)class;
  borrowed text;
  if (!borrow(env, folder, &text))
    return;
  int32_t code = engraft_trainer_restore(HANDLE(trainer, trainer), (const char *)text.bytes, text.length);
  give_back(env, &text);
  finish(env, code);
}

NATIVE(jlong, trainerAdapter)(JNIEnv *env, jclass class, jlong trainer)
{
  (void)class;
  engraft_adapter *adapter = NULL;
  int32_t code = engraft_trainer_adapter(HANDLE(trainer, trainer), &adapter);
  MADE(env, code, adapter, adapter);
}

NATIVE(void, trainerCancel)(JNIEnv *env, jclass class, jlong trainer)
{
  (void)class;
  finish(env, engraft_trainer_cancel(HANDLE(trainer, trainer)));
}

NATIVE(void, trainerPause)(JNIEnv *env, jclass class, jlong trainer)
{
  (void)class;
  finish(env, engraft_trainer_pause(HANDLE(trainer, trainer)));
}

NATIVE(void, trainerResume)(JNIEnv *env, jclass class, jlong trainer)
{
  (void)class;
  finish(env, engraft_trainer_resume(HANDLE(trainer, trainer)));
}

NATIVE(void, trainerSetThermal)(JNIEnv *env, jclass class, jlong trainer, jint thermal)
{
  (void)class;
  finish(env, engraft_trainer_set_thermal(HANDLE(trainer, trainer), thermal));
}

/* ---- Adapters and slots ----------------------------------------------------------------------- */

static const field adapter_params[] = {
  FIELD(engraft_adapter_params, force_base, "forceBase", FLAG),
  FIELD(engraft_adapter_params, scale, "scale", FLOAT),
  FIELD(engraft_adapter_params, threads, "threads", INT),
  END,
};

static const field adapter_info[] = {
  FIELD(engraft_adapter_info, kind, "kind", INT),
  FIELD(engraft_adapter_info, rank, "rank", INT),
  FIELD(engraft_adapter_info, dora, "dora", FLAG),
  FIELD(engraft_adapter_info, parameters, "parameters", LONG),
  FIELD(engraft_adapter_info, steps, "steps", LONG),
  FIELD(engraft_adapter_info, tokens, "tokens", LONG),
  FIELD(engraft_adapter_info, valid_loss_before, "validLossBefore", FLOAT),
  FIELD(engraft_adapter_info, valid_loss_after, "validLossAfter", FLOAT),
  END,
};

NATIVE(jlong, adapterLoad)(JNIEnv *env, jclass class, jlong model, jbyteArray path, jobject settings)
{
  (void)class;
  engraft_adapter *adapter = NULL;
  engraft_adapter_params params;
  borrowed text;
  if (!READ(env, adapter, adapter_params, settings, params) || !borrow(env, path, &text))
    return 0;
  int32_t code = engraft_adapter_load(HANDLE(model, model), (const char *)text.bytes, text.length, &params, &adapter);
  give_back(env, &text);
  MADE(env, code, adapter, adapter);
}

NATIVE(void, adapterFree)(JNIEnv *env, jclass class, jlong adapter)
{
  (void)class;
  finish(env, engraft_adapter_free(HANDLE(adapter, adapter)));
}

NATIVE(void, adapterInfo)(JNIEnv *env, jclass class, jlong adapter, jobject object)
{
  (void)class;
  engraft_adapter_info info = {.struct_size = sizeof info};
  if (finish(env, engraft_adapter_get_info(HANDLE(adapter, adapter), &info)))
    WRITE(env, adapter_info, object, info);
}

NATIVE(void, adapterSave)(JNIEnv *env, jclass class, jlong adapter, jbyteArray folder, jboolean half)
{
  (void)class;
  borrowed text;
  if (!borrow(env, folder, &text))
    return;
  int32_t code = engraft_adapter_save(HANDLE(adapter, adapter), (const char *)text.bytes, text.length, half != 0);
  give_back(env, &text);
  finish(env, code);
}

NATIVE(jlong, slotCreate)(JNIEnv *env, jclass class)
{
  (void)class;
  engraft_slot *slot = NULL;
  int32_t code = engraft_slot_create(&slot);
  MADE(env, code, slot, slot);
}

NATIVE(void, slotFree)(JNIEnv *env, jclass class, jlong slot)
{
  (void)class;
  finish(env, engraft_slot_free(HANDLE(slot, slot)));
}

NATIVE(jlong, slotSwap)(JNIEnv *env, jclass class, jlong slot, jlong adapter)
{
  (void)class;
  uint64_t generation = 0;
  finish(env, engraft_slot_swap(HANDLE(slot, slot), HANDLE(adapter, adapter), &generation));
  return (jlong)generation;
}

/* ---- Sessions --------------------------------------------------------------------------------- */

static const field session_params[] = {
  FIELD(engraft_session_params, ctx_size, "ctxSize", INT),
  FIELD(engraft_session_params, cache_type, "cacheType", INT),
  FIELD(engraft_session_params, threads, "threads", INT),
  FIELD(engraft_session_params, exact, "exact", FLAG),
  END,
};

static const field generate_params[] = {
  FIELD(engraft_generate_params, n_predict, "nPredict", INT),
  FIELD(engraft_generate_params, prompting, "prompting", INT),
  FIELD(engraft_generate_params, keep, "keep", FLAG),
  FIELD(engraft_generate_params, greedy, "greedy", FLAG),
  FIELD(engraft_generate_params, top_k, "topK", INT),
  FIELD(engraft_generate_params, temp, "temp", FLOAT),
  FIELD(engraft_generate_params, top_p, "topP", FLOAT),
  FIELD(engraft_generate_params, min_p, "minP", FLOAT),
  FIELD(engraft_generate_params, repeat_penalty, "repeatPenalty", FLOAT),
  FIELD(engraft_generate_params, seed, "seed", LONG),
  END,
};

static const field generate_info[] = {
  FIELD(engraft_generate_info, ended, "ended", INT),
  FIELD(engraft_generate_info, prompt_tokens, "promptTokens", LONG),
  FIELD(engraft_generate_info, tokens, "tokens", LONG),
  FIELD(engraft_generate_info, prompt_seconds, "promptSeconds", DOUBLE),
  FIELD(engraft_generate_info, seconds, "seconds", DOUBLE),
  FIELD(engraft_generate_info, generation, "generation", LONG),
  END,
};

NATIVE(jlong, sessionBytes)(JNIEnv *env, jclass class, jlong model, jobject settings, jint rank)
{
  (void)class;
  uint64_t bytes = 0;
  engraft_session_params params;
  if (FITS(env, rank, UINT32_MAX) && READ(env, session, session_params, settings, params))
    finish(env, engraft_session_bytes(HANDLE(model, model), &params, (uint32_t)rank, &bytes));
  return (jlong)bytes;
}

NATIVE(jlong, sessionCreate)(JNIEnv *env, jclass class, jlong model, jlong adapter, jobject settings)
{
  (void)class;
  engraft_session *session = NULL;
  engraft_session_params params;
  if (!READ(env, session, session_params, settings, params))
    return 0;
  int32_t code = engraft_session_create(HANDLE(model, model), HANDLE(adapter, adapter), &params, &session);
  MADE(env, code, session, session);
}

NATIVE(void, sessionFree)(JNIEnv *env, jclass class, jlong session)
{
  (void)class;
  finish(env, engraft_session_free(HANDLE(session, session)));
}

NATIVE(void, sessionSetAdapter)(JNIEnv *env, jclass class, jlong session, jlong adapter)
{
  (void)class;
  finish(env, engraft_session_set_adapter(HANDLE(session, session), HANDLE(adapter, adapter)));
}

NATIVE(void, sessionFollow)(JNIEnv *env, jclass class, jlong session, jlong slot)
{
  (void)class;
  finish(env, engraft_session_follow(HANDLE(session, session), HANDLE(slot, slot)));
}

NATIVE(void, sessionGenerate)(JNIEnv *env, jclass class, jlong session, jbyteArray prompt, jobject settings,
                              jbyteArray system, jobject sink, jobject object)
{
  (void)class;
  call to = {env, sink};
  engraft_generate_params params;
  engraft_generate_info info = {.struct_size = sizeof info};
  borrowed asked, role;
  if (!READ(env, generate, generate_params, settings, params) || !borrow(env, prompt, &asked))
    return;
  if (!borrow(env, system, &role)) {
    give_back(env, &asked);
    return;
  }
  params.system = (const char *)role.bytes;
  params.system_length = role.length;
  int32_t code = engraft_session_generate(HANDLE(session, session), (const char *)asked.bytes, asked.length, &params,
                                          sink ? on_text : NULL, &to, &info);
  give_back(env, &role);
  give_back(env, &asked);
  if (WRITE(env, generate_info, object, info))
    finish(env, code);
}

NATIVE(void, sessionCancel)(JNIEnv *env, jclass class, jlong session)
{
  (void)class;
  finish(env, engraft_session_cancel(HANDLE(session, session)));
}

NATIVE(void, sessionReset)(JNIEnv *env, jclass class, jlong session)
{
  (void)class;
  finish(env, engraft_session_reset(HANDLE(session, session)));
}

NATIVE(void, sessionTrim)(JNIEnv *env, jclass class, jlong session)
{
  (void)class;
  finish(env, engraft_session_trim(HANDLE(session, session)));
}

/* ---- Gates ------------------------------------------------------------------------------------ */

static const field gate_params[] = {
  FIELD(engraft_gate_params, arms, "arms", INT),
  FIELD(engraft_gate_params, shots, "shots", INT),
  FIELD(engraft_gate_params, steps, "steps", INT),
  FIELD(engraft_gate_params, batch_size, "batchSize", INT),
  FIELD(engraft_gate_params, rank, "rank", INT),
  FIELD(engraft_gate_params, metric, "metric", INT),
  FIELD(engraft_gate_params, answer_tokens, "answerTokens", INT),
  FIELD(engraft_gate_params, train_rows, "trainRows", INT),
  FIELD(engraft_gate_params, held_out_rows, "heldOutRows", INT),
  FIELD(engraft_gate_params, examples_min, "examplesMin", INT),
  FIELD(engraft_gate_params, resamples, "resamples", INT),
  FIELD(engraft_gate_params, evaluations, "evaluations", INT),
  FIELD(engraft_gate_params, threads, "threads", INT),
  FIELD(engraft_gate_params, exact, "exact", FLAG),
  FIELD(engraft_gate_params, loss_alone, "lossAlone", FLAG),
  FIELD(engraft_gate_params, no_built_in_retention, "noBuiltInRetention", FLAG),
  FIELD(engraft_gate_params, protect_off, "protectOff", FLAG),
  FIELD(engraft_gate_params, minutes, "minutes", DOUBLE),
  FIELD(engraft_gate_params, learning_rate, "learningRate", DOUBLE),
  FIELD(engraft_gate_params, level, "level", DOUBLE),
  FIELD(engraft_gate_params, seed, "seed", LONG),
  FIELD(engraft_gate_params, memory_budget, "memoryBudget", LONG),
  FIELD(engraft_gate_params, kl_weight, "klWeight", DOUBLE),
  FIELD(engraft_gate_params, replay_count, "replayCount", INT),
  FIELD(engraft_gate_params, replay_tokens, "replayTokens", INT),
  FIELD(engraft_gate_params, replay_share, "replayShare", DOUBLE),
  END,
};

NATIVE(jlong, gateCreate)(JNIEnv *env, jclass class, jlong model, jlong data, jobject settings, jlong replay,
                          jbyteArray retention, jlong retention_rows, jbyteArray unfinished, jlong store)
{
  (void)class;
  engraft_gate *gate = NULL;
  engraft_gate_params params;
  borrowed text, folder;
  if (!READ(env, gate, gate_params, settings, params) || !borrow(env, retention, &text))
    return 0;
  if (!borrow(env, unfinished, &folder)) {
    give_back(env, &text);
    return 0;
  }
  params.replay = HANDLE(data, replay);
  params.retention = (const char *)text.bytes;
  params.retention_length = text.length;
  params.retention_rows = HANDLE(data, retention_rows);
  params.unfinished = (const char *)folder.bytes;
  params.unfinished_length = folder.length;
  params.store = HANDLE(store, store);
  int32_t code = engraft_gate_create(HANDLE(model, model), HANDLE(data, data), &params, &gate);
  give_back(env, &folder);
  give_back(env, &text);
  MADE(env, code, gate, gate);
}

NATIVE(void, gateFree)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  finish(env, engraft_gate_free(HANDLE(gate, gate)));
}

NATIVE(void, gateRun)(JNIEnv *env, jclass class, jlong gate, jobject listener)
{
  (void)class;
  call to = {env, listener};
  finish(env, engraft_gate_run(HANDLE(gate, gate), listener ? on_progress : NULL, &to));
}

NATIVE(jint, gateDecision)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  uint32_t decision = 0;
  finish(env, engraft_gate_decision(HANDLE(gate, gate), &decision, NULL, 0, NULL));
  return (jint)decision;
}

NATIVE(jbyteArray, gateArm)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  COPIED(env, engraft_gate_decision, HANDLE(gate, gate), &(uint32_t){0});
}

NATIVE(jbyteArray, gateVerdict)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  COPIED(env, engraft_gate_verdict, HANDLE(gate, gate));
}

NATIVE(jbyteArray, gateReport)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  COPIED(env, engraft_gate_report, HANDLE(gate, gate));
}

NATIVE(jlong, gateAdapter)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  engraft_adapter *adapter = NULL;
  int32_t code = engraft_gate_adapter(HANDLE(gate, gate), &adapter);
  MADE(env, code, adapter, adapter);
}

NATIVE(void, gateCancel)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  finish(env, engraft_gate_cancel(HANDLE(gate, gate)));
}

NATIVE(void, gatePause)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  finish(env, engraft_gate_pause(HANDLE(gate, gate)));
}

NATIVE(void, gateResume)(JNIEnv *env, jclass class, jlong gate)
{
  (void)class;
  finish(env, engraft_gate_resume(HANDLE(gate, gate)));
}

NATIVE(void, gateSetThermal)(JNIEnv *env, jclass class, jlong gate, jint thermal)
{
  (void)class;
  finish(env, engraft_gate_set_thermal(HANDLE(gate, gate), thermal));
}

/* ---- Stores ----------------------------------------------------------------------------------- */

static const field generation_info[] = {
  FIELD(engraft_generation_info, kind, "kind", INT),
  FIELD(engraft_generation_info, number, "number", LONG),
  FIELD(engraft_generation_info, previous, "previous", LONG),
  FIELD(engraft_generation_info, bytes, "bytes", LONG),
  FIELD(engraft_generation_info, passed_over, "passedOver", LONG),
  END,
};

NATIVE(jlong, storeOpen)(JNIEnv *env, jclass class, jbyteArray folder, jboolean must_exist)
{
  (void)class;
  engraft_store *store = NULL;
  engraft_store_params params;
  borrowed text;
  if (!finish(env, engraft_store_default_params(&params, sizeof params)) || !borrow(env, folder, &text))
    return 0;
  params.must_exist = must_exist != 0;
  int32_t code = engraft_store_open((const char *)text.bytes, text.length, &params, &store);
  give_back(env, &text);
  MADE(env, code, store, store);
}

NATIVE(void, storeFree)(JNIEnv *env, jclass class, jlong store)
{
  (void)class;
  finish(env, engraft_store_free(HANDLE(store, store)));
}

NATIVE(jlong, storePromote)(JNIEnv *env, jclass class, jlong store, jlong gate)
{
  (void)class;
  uint64_t generation = 0;
  finish(env, engraft_store_promote(HANDLE(store, store), HANDLE(gate, gate), &generation));
  return (jlong)generation;
}

NATIVE(jlong, storePromoteAdapter)(JNIEnv *env, jclass class, jlong store, jlong adapter, jbyteArray verdict)
{
  (void)class;
  uint64_t generation = 0;
  borrowed text;
  if (!borrow(env, verdict, &text))
    return 0;
  int32_t code = engraft_store_promote_adapter(HANDLE(store, store), HANDLE(adapter, adapter),
                                               (const char *)text.bytes, text.length, &generation);
  give_back(env, &text);
  finish(env, code);
  return (jlong)generation;
}

NATIVE(jbyteArray, storeActive)(JNIEnv *env, jclass class, jlong store, jobject object)
{
  (void)class;
  engraft_generation_info info = {.struct_size = sizeof info};
  if (!finish(env, engraft_store_active(HANDLE(store, store), &info)) || !WRITE(env, generation_info, object, info))
    return NULL;
  return to_bytes(env, info.base_digest, sizeof info.base_digest);
}

NATIVE(jlong, storeLoad)(JNIEnv *env, jclass class, jlong store, jlong model, jobject settings)
{
  (void)class;
  engraft_adapter *adapter = NULL;
  engraft_adapter_params params;
  if (!READ(env, adapter, adapter_params, settings, params))
    return 0;
  int32_t code = engraft_store_load(HANDLE(store, store), HANDLE(model, model), &params, &adapter);
  MADE(env, code, adapter, adapter);
}

NATIVE(jlong, storeRollback)(JNIEnv *env, jclass class, jlong store)
{
  (void)class;
  uint64_t generation = 0;
  finish(env, engraft_store_rollback(HANDLE(store, store), &generation));
  return (jlong)generation;
}

NATIVE(void, storeActivate)(JNIEnv *env, jclass class, jlong store, jlong generation)
{
  (void)class;
  if (FITS(env, generation, UINT64_MAX))
    finish(env, engraft_store_activate(HANDLE(store, store), (uint64_t)generation));
}

NATIVE(jlong, storePrune)(JNIEnv *env, jclass class, jlong store, jlong keep)
{
  (void)class;
  uint64_t removed = 0;
  if (FITS(env, keep, SIZE_MAX))
    finish(env, engraft_store_prune(HANDLE(store, store), (size_t)keep, &removed));
  return (jlong)removed;
}

NATIVE(jbyteArray, storeList)(JNIEnv *env, jclass class, jlong store)
{
  (void)class;
  COPIED(env, engraft_store_list, HANDLE(store, store));
}
