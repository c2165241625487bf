import dev.engraft.*;

import java.io.IOException;
import java.lang.reflect.Field;
import java.lang.reflect.Modifier;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * A whole life through the Java classes, and misuse of them.
 *
 * AdaptTest MODEL.gguf TRAIN.jsonl FOLDER engraft.h engraft_jni.c; FOLDER exists and is empty. Prints what it finds,
 * and exits with 1 if anything does not hold. With the one argument "steps" before these it only trains.
 */
public final class AdaptTest {
    private static final int STEPS = 48;
    private static final int CYCLES = 200;
    /** KiB that half of the cycles may add. */
    private static final long GROWN_MAX = 4096;
    private static final String ASKED = "Turn on the lights in the cave.";
    private static int failures = 0;

    private final String modelPath;
    private final String rowsPath;
    private final String rows;
    private final Path folder;

    private AdaptTest(String model, String rows, String folder) throws IOException {
        this.modelPath = model;
        this.rowsPath = rows;
        this.rows = new String(Files.readAllBytes(Paths.get(rows)), StandardCharsets.UTF_8);
        this.folder = Paths.get(folder);
    }

    public static void main(String[] arguments) throws Exception {
        boolean stepsOnly = arguments.length == 4 && arguments[0].equals("steps");
        if (!stepsOnly && arguments.length != 5) {
            System.err.println("usage: AdaptTest MODEL TRAIN.jsonl FOLDER engraft.h engraft_jni.c");
            System.exit(2);
        }
        int first = stepsOnly ? 1 : 0;
        AdaptTest test = new AdaptTest(arguments[first], arguments[first + 1], arguments[first + 2]);
        if (stepsOnly) {
            test.steps();
            System.exit(0);
        }
        test.header(Paths.get(arguments[3]), Paths.get(arguments[4]));
        test.all();
        System.out.println(failures + " checks failed");
        System.exit(failures == 0 ? 0 : 1);
    }

    private void all() throws Exception {
        try (Model model = Model.open(modelPath); Data data = Data.of(model, rows, quarter())) {
            figures(model, data);
            train(model, data);
            generate(model);
            store(model);
            wrongModel(model);
            misuse(model, data);
            longMessages();
            thrownByListeners(model, data);
            steered(model, data);
            gate(model, data);
            promoted(model, beside("private_test.jsonl"), beside("everyday.txt"));
        }
        cycles();
    }

    // ---- What is checked how --------------------------------------------------------------------

    private interface Call {
        void run() throws Exception;
    }

    private static void check(String what, boolean holds) {
        if (!holds) {
            failures++;
            System.err.println("FAILED: " + what);
        }
    }

    private static void expect(int code, Call call) {
        String wanted = Engraft.codeName(code);
        try {
            call.run();
            check(wanted + " was expected, nothing was thrown, at " + caller(), false);
        } catch (EngraftException e) {
            boolean told = e.getMessage() != null && !e.getMessage().isEmpty();
            check(wanted + " was expected, not " + e.codeName() + ": " + e.getMessage() + ", at " + caller(),
                    e.code() == code && told);
        } catch (Exception e) {
            check(wanted + " was expected, not " + e + ", at " + caller(), false);
        }
    }

    private static void expect(Class<? extends Throwable> kind, Call call) {
        try {
            call.run();
            check(kind + " was expected, nothing was thrown, at " + caller(), false);
        } catch (Throwable e) {
            check(kind + " was expected, not " + e + ", at " + caller(), e.getClass() == kind);
        }
    }

    private static StackTraceElement caller() {
        for (StackTraceElement at : new Throwable().getStackTrace()) {
            if (!at.getMethodName().equals("caller") && !at.getMethodName().equals("expect")) {
                return at;
            }
        }
        return null;
    }

    private String in(String name) {
        return folder.resolve(name).toString();
    }

    private static DataParams quarter() {
        DataParams params = new DataParams();
        params.validFraction = 0.25;
        return params;
    }

    private static TrainParams training(long steps) {
        TrainParams params = new TrainParams();
        params.steps = steps;
        params.learningRate = 2e-3;
        params.threads = 2;
        return params;
    }

    private static SessionParams oneThread() {
        SessionParams params = new SessionParams();
        params.threads = 1;
        return params;
    }

    private static GenerateParams greedy() {
        GenerateParams params = new GenerateParams();
        params.greedy = true;
        params.prompting = Engraft.PROMPT_CHAT;
        params.nPredict = 24;
        return params;
    }

    // ---- The Java side against the header -------------------------------------------------------

    /** Every constant and every member that the header has must be here, and nothing else. */
    private void header(Path header, Path jni) throws Exception {
        String text = new String(Files.readAllBytes(header), StandardCharsets.UTF_8);
        Set<String> wanted = new TreeSet<>();
        Matcher constants = Pattern.compile("#define ENGRAFT_(\\w+) (-?\\d+)\n").matcher(text);
        while (constants.find()) {
            wanted.add(constants.group(1) + " = " + constants.group(2));
        }
        Set<String> found = new TreeSet<>();
        for (Field field : Engraft.class.getDeclaredFields()) {
            if (Modifier.isPublic(field.getModifiers())) {
                found.add(field.getName() + " = " + field.getInt(null));
            }
        }
        check("constants: " + difference(wanted, found), wanted.equals(found) && wanted.size() > 60);

        wanted.clear();
        Matcher structs = Pattern.compile("typedef struct \\{\n([^}]*)\\} (engraft_\\w+);").matcher(text);
        while (structs.find()) {
            String name = structs.group(2);
            // Their members travel as arguments.
            if (name.matches("engraft_(model_params|store_params|progress)")) {
                continue;
            }
            Matcher members = Pattern.compile("\n  (?:u?int\\d+_t|float|double) (\\w+);").matcher(structs.group(1));
            while (members.find()) {
                if (!members.group(1).matches("struct_size|reserved")) {
                    wanted.add(name + "." + members.group(1));
                }
            }
        }
        found.clear();
        String source = new String(Files.readAllBytes(jni), StandardCharsets.UTF_8);
        Matcher fields = Pattern.compile("FIELD\\((engraft_\\w+), (\\w+), \"\\w+\"").matcher(source);
        while (fields.find()) {
            found.add(fields.group(1) + "." + fields.group(2));
        }
        check("members: " + difference(wanted, found), wanted.equals(found) && wanted.size() > 90);
        System.out.println("header: constants and " + wanted.size() + " members are those of the Java side");
    }

    private static String difference(Set<String> a, Set<String> b) {
        Set<String> onlyA = new TreeSet<>(a);
        onlyA.removeAll(b);
        Set<String> onlyB = new TreeSet<>(b);
        onlyB.removeAll(a);
        return "only in the header " + onlyA + ", only in Java " + onlyB;
    }

    // ---- A life ---------------------------------------------------------------------------------

    private void figures(Model model, Data data) {
        ModelInfo info = model.info();
        check("a model has blocks and bytes", info.nLayers > 0 && info.mappedBytes > 0 && info.vocab > 0);
        check("a digest has 32 bytes", model.digest().length == 32);
        DataInfo rowsInfo = data.info();
        check("rows are split", rowsInfo.trainRows > rowsInfo.validRows && rowsInfo.validRows > 0);
        check("the split is told", rowsInfo.splitBySeed && rowsInfo.skipped == 0);
        try (Plan plan = Plan.create(model, data, training(STEPS))) {
            PlanInfo total = plan.info();
            long sum = plan.pools().values().stream().mapToLong(Long::longValue).sum();
            check("pools add up", total.fits && sum == total.privateBytes && sum > 0);
            check("nothing to advise", plan.advice().isEmpty());
            System.out.println("plan: " + sum + " bytes private, " + total.mappedBytes + " mapped; session "
                    + Plan.sessionBytes(model, null, 8) + "; library " + Engraft.version());
        }
        TrainParams tight = training(STEPS);
        tight.memoryBudget = 1 << 20;
        try (Plan plan = Plan.create(model, data, tight)) {
            check("a tight plan has advice", !plan.info().fits && plan.advice().length() > 0);
        }
        expect(Engraft.DOES_NOT_FIT, () -> Trainer.create(model, data, tight));
    }

    private void train(Model model, Data data) {
        try (Trainer trainer = Trainer.create(model, data, training(STEPS))) {
            double before = trainer.evaluate();
            Progress one = trainer.step();
            check("a step tells", one.step == 1 && one.steps == STEPS && one.loss > 0 && one.text == null);
            List<Double> losses = new ArrayList<>();
            trainer.run(0, progress -> {
                if (progress.event == Engraft.EVENT_STEP) {
                    losses.add(progress.loss);
                }
                return true;
            });
            check("each step is told", losses.size() == STEPS - 1 && trainer.now().step == STEPS);
            double after = trainer.evaluate();
            check("it learnt: " + before + " to " + after, after < 0.9 * before);
            trainer.save(in("adaptér 😀"));
            System.out.println("training: held-out loss " + before + " to " + after + " in " + STEPS + " steps, "
                    + Math.round(trainer.now().tokensPerS) + " tokens/s");
        }
    }

    /** One step after another in one call, for what only a long call shows. */
    private void steps() {
        try (Model model = Model.open(modelPath); Data data = Data.of(model, rows, quarter());
                Trainer trainer = Trainer.create(model, data, training(STEPS))) {
            trainer.run(0, progress -> true);
        }
    }

    private void generate(Model model) {
        String path = in("adaptér 😀");
        try (Adapter adapter = Adapter.load(model, path, null);
                Session base = Session.create(model, null, oneThread());
                Session tuned = Session.create(model, adapter, oneThread());
                Slot slot = new Slot()) {
            AdapterInfo info = adapter.info();
            check("an adapter tells", info.kind == Engraft.KIND_ADAPTER && info.rank == 8 && info.steps == STEPS);
            String without = base.answer(ASKED, greedy());
            String with = tuned.answer(ASKED, greedy());
            check("an adapter changes the text", !without.equals(with) && !with.isEmpty());
            base.follow(slot);
            check("a swap counts", slot.swap(adapter) == 1);
            check("a slot gives the adapter", base.answer(ASKED, greedy()).equals(with));
            slot.swap(null);
            check("an emptied slot gives the base", base.answer(ASKED, greedy()).equals(without));
            tuned.setAdapter(null);
            check("without it the base is back", tuned.answer(ASKED, greedy()).equals(without));
            AtomicInteger parts = new AtomicInteger();
            GenerateInfo stopped = base.generate("Once", null, text -> parts.incrementAndGet() < 2);
            check("a listener stops it", stopped.ended == Engraft.ENDED_CANCELLED && parts.get() == 2);
            GenerateParams system = greedy();
            system.system = "Antworte auf Deutsch: ÄÖÜ \u0000 𝄞";
            GenerateInfo said = base.generate("Größe 😀 \u0000 ?", system, null);
            check("any Unicode passes", said.promptTokens > 0);
            base.trim();
            base.reset();
            System.out.println("base:    " + without.trim() + "\nadapter: " + with.trim());
        }
    }

    private void store(Model model) {
        try (Store store = Store.open(in("store")); Adapter adapter = Adapter.load(model, in("adaptér 😀"), null)) {
            check("an empty store has no generation", store.active().kind == 0);
            expect(Engraft.MISUSE, store::rollback);
            check("the first", store.promote(adapter, "a test: ü") == 1);
            check("the second", store.promote(adapter, "another") == 2);
            GenerationInfo active = store.active();
            check("it is active", active.number == 2 && active.previous == 1 && active.baseDigest.length == 32);
            check("its base is the model", java.util.Arrays.equals(active.baseDigest, model.digest()));
            try (Adapter loaded = store.load(model, null); Session session = Session.create(model, loaded, oneThread())) {
                check("what is loaded generates", !session.answer(ASKED, greedy()).isEmpty());
            }
            check("back", store.rollback() == 1);
            store.activate(2);
            expect(Engraft.MISUSE, () -> store.activate(9));
            expect(Engraft.MISUSE, () -> store.activate(-1));
            expect(Engraft.MISUSE, () -> store.prune(0));
            expect(Engraft.MISUSE, () -> store.prune(-1));
            store.prune(1);
            check("the list tells", store.list().contains("\"active\":2"));
        }
        expect(Engraft.MISUSE, () -> Store.open(in("none"), true));
    }

    private void gate(Model model, Data data) {
        GateParams params = new GateParams();
        params.arms = Engraft.ARM_FEW_SHOT | Engraft.ARM_LORA;
        params.shots = 1;
        params.steps = 8;
        params.rank = 2;
        params.learningRate = 2e-3;
        params.answerTokens = 8;
        params.resamples = 200;
        params.threads = 2;
        params.retention = "%% letter\nDear neighbour, the keys lie under the mat.\n%% note\nBuy bread.\n";
        try (Store store = Store.open(in("judged"))) {
            params.store = store;
            judged(model, data, params);
        }
    }

    private void judged(Model model, Data data, GateParams params) {
        Store store = params.store;
        try (Gate gate = Gate.create(model, data, params)) {
            check("nothing is judged yet", gate.decision() == Engraft.DECISION_NONE);
            expect(Engraft.MISUSE, gate::verdict);
            AtomicInteger events = new AtomicInteger();
            expect(Engraft.CANCELLED, () -> gate.run(progress -> events.incrementAndGet() < 2));
            gate.run(progress -> {
                gate.setThermal(Engraft.THERMAL_NOMINAL);
                return true;
            });
            int decision = gate.decision();
            check("it is judged", decision != Engraft.DECISION_NONE && gate.verdict().contains("\"decision\""));
            check("there is a report", gate.report().contains("<html"));
            if (decision == Engraft.DECISION_KEEP_BASE) {
                expect(Engraft.GATE_REFUSED, () -> store.promote(gate));
                expect(Engraft.GATE_REFUSED, gate::adapter);
            } else {
                check("it is promoted", store.promote(gate) == 1);
                gate.adapter().close();
            }
            System.out.println("gate: decision " + decision + " " + gate.arm());
        }
    }

    private byte[] beside(String name) throws IOException {
        return Files.readAllBytes(Paths.get(rowsPath).resolveSibling(name));
    }

    /** The whole way: the demo's words are learned, the gate finds that better, the store keeps it, a session has it. */
    private void promoted(Model model, byte[] held, byte[] everyday) {
        GateParams params = new GateParams();
        params.arms = Engraft.ARM_LORA;
        params.steps = 40;
        params.batchSize = 8;
        params.rank = 4;
        params.learningRate = 5e-4;
        params.evaluations = 2;
        params.klWeight = 0.02;
        // The tiny model knows commands of a household, and nothing of the text that is built in.
        params.noBuiltInRetention = true;
        params.retention = new String(everyday, StandardCharsets.UTF_8);
        params.resamples = 500;
        params.threads = 2;
        try (Data data = Data.of(model, rows.getBytes(StandardCharsets.UTF_8), null, held, null);
                Gate gate = Gate.create(model, data, params);
                Store store = Store.open(in("promoted"))) {
            gate.run(progress -> true);
            check("what was learned is promoted", gate.decision() == Engraft.DECISION_PROMOTE);
            if (gate.decision() != Engraft.DECISION_PROMOTE) {
                System.err.println(gate.verdict());
                return;
            }
            check("the first generation", store.promote(gate) == 1);
            try (Adapter adapter = store.load(model, null); Session session = Session.create(model, adapter, oneThread())) {
                System.out.println("promoted: " + session.answer(ASKED, greedy()));
            }
        }
    }

    // ---- Misuse ---------------------------------------------------------------------------------

    private void wrongModel(Model model) throws IOException {
        expect(Engraft.IO, () -> Model.open(in("no such file")));
        expect(NullPointerException.class, () -> Model.open(null));
        Path nonsense = folder.resolve("nonsense.gguf");
        Files.write(nonsense, "not a model".getBytes(StandardCharsets.UTF_8));
        expect(Engraft.CORRUPT, () -> Model.open(nonsense.toString()));
        expect(Engraft.CORRUPT, () -> Adapter.load(model, modelPath, null));
        byte[] bytes = Files.readAllBytes(Paths.get(modelPath));
        bytes[bytes.length - 100] ^= 1;
        Path other = folder.resolve("other.gguf");
        Files.write(other, bytes);
        try (Model changed = Model.open(other.toString()); Store store = Store.open(in("store"))) {
            expect(Engraft.BASE_MISMATCH, () -> Adapter.load(changed, in("adaptér 😀"), null));
            expect(Engraft.BASE_MISMATCH, () -> store.load(changed, null));
            log(changed);
        }
    }

    /** Taking an adapter of another base by force is what the library warns of. */
    private void log(Model changed) {
        AdapterParams forced = new AdapterParams();
        forced.forceBase = true;
        List<String> lines = new ArrayList<>();
        Engraft.setLog((level, line) -> lines.add(level + " " + line), Engraft.LOG_DEBUG);
        Adapter.load(changed, in("adaptér 😀"), forced).close();
        check("the log warns: " + lines, lines.stream().anyMatch(line -> line.startsWith(Engraft.LOG_WARN + " ")));
        Engraft.setLog((level, line) -> {
            throw new Own();
        }, Engraft.LOG_DEBUG);
        expect(Own.class, () -> Adapter.load(changed, in("adaptér 😀"), forced));
        Engraft.setLog(null, Engraft.LOG_NONE);
        int before = lines.size();
        Adapter.load(changed, in("adaptér 😀"), forced).close();
        check("the log is silent again", lines.size() == before);
        expect(Engraft.MISUSE, () -> Engraft.setLog((level, line) -> { }, 99));
        Engraft.setLog(null, Engraft.LOG_NONE);
    }

    private void misuse(Model model, Data data) {
        expect(Engraft.BAD_DATA, () -> Data.of(model, "{\"a\":1}\n", null));
        expect(Engraft.IO, () -> Data.open(model, in("none.jsonl"), null));
        expect(NullPointerException.class, () -> Data.of(model, (String) null, null));
        expect(Engraft.MISUSE, () -> data.skipped(-1));
        expect(Engraft.MISUSE, () -> Plan.sessionBytes(model, null, -1));
        TrainParams wide = training(1);
        wide.rank = 1000;
        expect(Engraft.MISUSE, () -> Plan.create(model, data, wide));
        wide.rank = -1;
        expect(Engraft.MISUSE, () -> Trainer.create(model, data, wide));
        Model closedModel = Model.open(modelPath);
        Session session = Session.create(closedModel, null, oneThread());
        closedModel.close();
        closedModel.close();
        check("it is closed", closedModel.isClosed());
        expect(IllegalStateException.class, closedModel::info);
        expect(IllegalStateException.class, () -> Session.create(closedModel, null, null));
        check("a session outlives its model", !session.answer(ASKED, greedy()).isEmpty());
        session.close();
        expect(IllegalStateException.class, () -> session.answer("x", null));
        expect(IllegalStateException.class, session::cancel);
        Trainer trainer = Trainer.create(model, data, training(1));
        expect(Engraft.MISUSE, () -> trainer.run(-1, null));
        trainer.step();
        expect(Engraft.MISUSE, trainer::step);
        trainer.close();
        expect(IllegalStateException.class, trainer::step);
        Slot slot = new Slot();
        slot.close();
        expect(IllegalStateException.class, () -> slot.swap(null));
    }

    /** Wherever between the bytes of a character the JNI layer's buffer ends, nothing follows what is told. */
    private void longMessages() {
        StringBuilder name = new StringBuilder();
        for (int i = 0; i < 1000; i++) {
            name.append('€');
        }
        for (int shift = 0; shift < 3; shift++) {
            try {
                Model.open(in(name.insert(0, 'x').toString())).close();
                check("so long a name was opened", false);
            } catch (EngraftException e) {
                String told = e.getMessage();
                check("a long message is cut", told.length() > 500 && told.length() < 2048 && told.endsWith("€"));
            }
        }
    }

    private static final class Own extends RuntimeException {
        private static final long serialVersionUID = 1;
    }

    private void thrownByListeners(Model model, Data data) {
        AtomicInteger calls = new AtomicInteger();
        try (Trainer trainer = Trainer.create(model, data, training(20))) {
            expect(Own.class, () -> trainer.run(0, progress -> {
                if (calls.incrementAndGet() == 3) {
                    throw new Own();
                }
                return true;
            }));
            check("the exception ended it", calls.get() == 3 && trainer.now().step == 3);
            expect(IllegalStateException.class, () -> trainer.run(2, progress -> {
                Slot slot = new Slot();
                slot.close();
                return slot.swap(null) > 0;
            }));
            expect(Engraft.BUSY, () -> trainer.run(2, progress -> trainer.step() != null));
            trainer.run(2, null);
            check("another call goes on", trainer.now().step == 7);
        }
        try (Session session = Session.create(model, null, oneThread())) {
            expect(Own.class, () -> session.generate("Once", null, text -> {
                throw new Own();
            }));
            expect(StackOverflowError.class, () -> session.generate("Once", null, text -> endless(1) > 0));
            check("the session goes on", !session.answer(ASKED, greedy()).isEmpty());
        }
    }

    private static int endless(int depth) {
        return endless(depth + 1) + 1;
    }

    private void steered(Model model, Data data) throws Exception {
        try (Trainer trainer = Trainer.create(model, data, training(1_000_000))) {
            AtomicInteger steps = new AtomicInteger();
            Thread other = new Thread(() -> {
                try {
                    while (steps.get() < 2) {
                        Thread.sleep(1);
                    }
                    expect(Engraft.BUSY, trainer::step);
                    expect(Engraft.BUSY, trainer::close);
                    check("it stays open", !trainer.isClosed());
                    trainer.pause();
                    trainer.resume();
                    trainer.setThermal(Engraft.THERMAL_CRITICAL);
                    Thread.sleep(50);
                    trainer.cancel();
                } catch (Exception e) {
                    check("steering: " + e, false);
                }
            });
            other.start();
            expect(Engraft.CANCELLED, () -> trainer.run(0, progress -> steps.incrementAndGet() > 0));
            other.join();
            expect(Engraft.CANCELLED, trainer::step);
            trainer.resume();
            trainer.setThermal(Engraft.THERMAL_NOMINAL);
            check("it goes on", trainer.step().step > 2);
        }
        try (Session session = Session.create(model, null, oneThread())) {
            Thread[] other = new Thread[1];
            GenerateParams endless = new GenerateParams();
            endless.nPredict = -1;
            GenerateInfo info = session.generate("Once", endless, text -> {
                if (other[0] == null) {
                    other[0] = new Thread(session::cancel);
                    other[0].start();
                    try {
                        other[0].join();
                    } catch (InterruptedException e) {
                        throw new IllegalStateException(e);
                    }
                }
                return true;
            });
            check("it was cancelled", info.ended == Engraft.ENDED_CANCELLED && other[0] != null);
        }
    }

    // ---- Memory ---------------------------------------------------------------------------------

    private void cycles() throws IOException {
        long middle = 0;
        for (int i = 0; i < CYCLES; i++) {
            if (i == CYCLES / 2) {
                middle = resident();
            }
            cycle(i);
        }
        long grown = resident() - middle;
        check("memory grew by " + grown + " KiB in " + CYCLES / 2 + " cycles", grown < GROWN_MAX);
        System.out.println("memory: " + CYCLES + " cycles, " + middle + " KiB in the middle, " + grown + " more at the end"
                + "; " + open() + " with what four cycles make left open");
    }

    /** What stays open must be seen by the same measure. Gives the KiB. */
    private long open() throws IOException {
        List<Handle> handles = new ArrayList<>();
        long before = resident();
        for (int i = 0; i < 4; i++) {
            Model model = Model.open(modelPath);
            Data data = Data.of(model, rows, null);
            Trainer trainer = Trainer.create(model, data, training(1));
            trainer.step();
            handles.add(trainer);
            handles.add(data);
            handles.add(model);
        }
        long grown = resident() - before;
        handles.forEach(Handle::close);
        check("what stays open is not seen: " + grown + " KiB", grown > GROWN_MAX);
        return grown;
    }

    private void cycle(int i) {
        try (Model model = Model.open(modelPath);
                Data data = Data.of(model, rows, null);
                Plan plan = Plan.create(model, data, null);
                Trainer trainer = Trainer.create(model, data, training(2));
                Session session = Session.create(model, null, oneThread());
                Store store = Store.open(in("store"))) {
            check("it fits", plan.info().fits && !store.list().isEmpty());
            expect(Engraft.IO, () -> Model.open(in("no such file")));
            if (i % 20 == 0) {
                trainer.run(0, progress -> true);
                session.answer("Once", greedy());
            }
        }
    }

    /** VmRSS of this process in KiB, after what Java no longer needs is gone. */
    private static long resident() throws IOException {
        System.gc();
        for (String line : Files.readAllLines(Paths.get("/proc/self/status"))) {
            if (line.startsWith("VmRSS:")) {
                return Long.parseLong(line.replaceAll("\\D", ""));
            }
        }
        throw new IOException("/proc/self/status tells no VmRSS");
    }
}
