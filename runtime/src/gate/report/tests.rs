use super::super::leak::Leak;
use super::super::verdict::{ArmKind, ArmResult, Basis, Decision, ExampleNll, Retention, Thresholds, judge};
use super::*;
use crate::rng::Rng;

/// Where to write the sample reports, for whoever wants to look at them.
const LOOK_VAR: &str = "ENGRAFT_REPORT_SAMPLES";
/// All that may go wrong when text from outside is shown.
const HOSTILE: &str =
    "</script><img src=x onerror=\"alert('1')\">&amp; \x1b]0;t\x07\x1b[31m\u{202e}txet\u{85}\0\u{2028}";

fn losses(mean: f64, noise: f64, seed: u64, n: usize) -> Vec<ExampleNll> {
    let (mut shared, mut own) = (Rng::new(1, 1), Rng::new(seed, 2));
    let one = |i| {
        let targets = 60 + i % 40;
        let token = mean + 0.2 * f64::from(shared.normal()) + noise * f64::from(own.normal());
        ExampleNll { sum: token * targets as f64, targets }
    };
    (0..n).map(one).collect()
}

fn arm(name: &str, kind: ArmKind, mean: f64, right: usize, forgot: &[(&str, f64, f64)]) -> ArmResult {
    let n = 400;
    let seed = name.bytes().map(u64::from).sum();
    let of = |r: &(&str, f64, f64)| Retention { text: r.0.into(), delta_nll: r.1, kl: r.2, retained: None };
    ArmResult {
        name: name.into(),
        kind,
        nll: losses(mean, 0.12, seed, n),
        correct: Some((0..n).map(|i| (i * 7919 + seed as usize) % n < right).collect()),
        retention: forgot.iter().map(of).collect(),
        task_kl: (kind == ArmKind::Trained).then_some(0.1412),
        strength: None,
    }
}

fn run(name: &str, what: &str, parameters: u64, from: f64, to: f64, steps: u64) -> ArmRun {
    let mut noise = Rng::new(parameters, 3);
    let point = |step: u64| {
        let loss = to + (from - to) * (-4.0 * step as f64 / steps as f64).exp();
        let train = (step > 0).then(|| loss + 0.05 * f64::from(noise.normal()));
        let valid =
            step.is_multiple_of(steps / 10).then(|| loss + 0.05 + 0.1 * (step as f64 / steps as f64).powi(3));
        CurvePoint { step, train, valid }
    };
    ArmRun {
        arm: name.into(),
        what: what.into(),
        parameters,
        learning_rate: 2e-4,
        curve: (0..=steps).step_by(5).map(point).collect(),
        steps,
        best_step: steps * 6 / 10,
        ended: "no better for 3 evaluations".into(),
        tokens: 512_345,
        seconds: 1834.2,
        planned_bytes: 412 << 20,
        peak_bytes: Some(385 << 20),
    }
}

fn scoring(name: &str, prefix_tokens: u64) -> Scoring {
    Scoring {
        arm: name.into(),
        prefix_tokens,
        tokens: 64_210,
        nll_seconds: 71.4,
        generated_tokens: 38_412,
        generate_seconds: 612.8,
    }
}

fn model() -> ModelFacts {
    ModelFacts {
        name: "SmolLM2 135M Instruct".into(),
        file: "SmolLM2-135M-Instruct.Q4_1.gguf".into(),
        digest: "9f3c".repeat(16),
        parameters: 134_515_008,
        dtype: "Q4_1".into(),
        mapped_bytes: 98_123_456,
    }
}

fn data() -> DataFacts {
    DataFacts {
        task: Some("gsm8k".into()),
        source: "gsm8k/".into(),
        train: (7073, 812_345),
        valid: (400, 45_210),
        held_out: (400, 44_871),
        skipped: 3,
    }
}

/// Five arms on grade school mathematics, with figures as they might be.
fn realistic() -> Report {
    let arms = [
        arm("zero-shot", ArmKind::ZeroShot, 1.412, 14, &[]),
        arm("5-shot", ArmKind::FewShot { k: 5 }, 1.305, 17, &[]),
        arm(
            "lora",
            ArmKind::Trained,
            1.061,
            42,
            &[("built-in", 0.0121, 0.0312), ("letters.txt", 0.0204, 0.0473)],
        ),
        arm(
            "dora",
            ArmKind::Trained,
            1.055,
            44,
            &[("built-in", 0.0118, 0.0298), ("letters.txt", 0.0187, 0.0441)],
        ),
        arm(
            "full",
            ArmKind::Trained,
            1.298,
            9,
            &[("built-in", 0.1871, 0.2204), ("letters.txt", 0.0921, 0.1377)],
        ),
    ];
    let binding = Basis {
        model: "9f3c".repeat(16),
        data_split: "07ab".repeat(16),
        settings: "e1d2".repeat(16),
        seed: 7,
    };
    let verdict =
        judge(&arms, &[], &Thresholds { resamples: 2000, ..Thresholds::default() }, &binding).unwrap();
    Report {
        title: "compare".into(),
        model: model(),
        data: data(),
        verdict,
        runs: vec![
            run("lora", "LoRA, rank 8 on all seven projections", 2_442_240, 1.45, 1.05, 1000),
            run("dora", "DoRA, rank 8 on all seven projections", 2_629_440, 1.45, 1.04, 1000),
            ArmRun {
                peak_bytes: Some(2 << 30),
                planned_bytes: 2_000_000_000,
                ..run("full", "all weights in f32", 134_515_008, 1.45, 1.21, 400)
            },
        ],
        scoring: vec![
            scoring("zero-shot", 0),
            scoring("5-shot", 912),
            scoring("lora", 0),
            scoring("dora", 0),
            scoring("full", 0),
        ],
        rate_test: Some(RateTest {
            points: (0..100)
                .map(|i| (1e-6 * 10f64.powf(f64::from(i) / 25.0), rate_loss(f64::from(i))))
                .collect(),
            chosen: 2e-4,
        }),
        samples: (0..5).map(|_| sample()).collect(),
        settings: vec![
            ("rank".into(), "8".into()),
            ("alpha".into(), "16".into()),
            ("shots chosen by".into(), "seed".into()),
        ],
        seconds: 9412.0,
    }
}

fn rate_loss(i: f64) -> f64 {
    1.45 - 0.3 / (1.0 + (-(i - 55.0) / 6.0).exp()) + (0.12 * (i - 88.0)).exp()
}

fn sample() -> SampleOutputs {
    let output = |arm: &str, text: &str, correct| Output { arm: arm.into(), text: text.into(), correct };
    SampleOutputs {
        prompt: "Natalia sold clips to 48 of her friends in April, and then she sold half as many \
                 clips in May. How many clips did Natalia sell altogether in April and May?"
            .into(),
        reference: "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether.\n\
                    #### 72"
            .into(),
        outputs: vec![
            output("lora", "She sold 48 / 2 = 24 clips in May.\n48 + 24 = 72.\n#### 72", Some(true)),
            output("zero-shot", "Natalia sold 48 + 48/2 = 96 clips in April and May.", Some(false)),
            output("5-shot", "48 / 2 = 24\n#### 24", Some(false)),
            output("full", "", None),
        ],
    }
}

/// Two arms, no task, nothing but losses.
fn small() -> Report {
    let mut arms = [
        arm("zero-shot", ArmKind::ZeroShot, 3.0, 0, &[]),
        arm("lora", ArmKind::Trained, 2.99, 0, &[("built-in", 0.01, 0.02)]),
    ];
    arms.iter_mut().for_each(|a| (a.correct, a.task_kl) = (None, None));
    let thresholds = Thresholds { resamples: 2000, few_shot_required: false, ..Thresholds::default() };
    let whole = realistic();
    Report {
        title: "adapt".into(),
        model: ModelFacts { name: String::new(), ..whole.model },
        data: DataFacts { task: None, source: "letters.txt".into(), skipped: 0, ..whole.data },
        verdict: judge(&arms, &[], &thresholds, &Basis::default()).unwrap(),
        runs: whole.runs[..1].to_vec(),
        scoring: vec![],
        rate_test: None,
        samples: vec![],
        settings: vec![],
        seconds: 61.0,
    }
}

/// The realistic one, with held-out rows in the training data.
fn leaked() -> Report {
    let leak = |i| Leak {
        held_out: format!("test.jsonl:{i}"),
        train: format!("train.jsonl:{}", 3 * i),
        exact: i % 2 == 0,
    };
    let leaks: Vec<Leak> = (1..=23).map(leak).collect();
    let arms = [
        arm("zero-shot", ArmKind::ZeroShot, 1.4, 14, &[]),
        arm("lora", ArmKind::Trained, 0.6, 80, &[("built-in", 0.01, 0.02)]),
    ];
    let thresholds = Thresholds { resamples: 2000, ..Thresholds::default() };
    let verdict = judge(&arms, &leaks, &thresholds, &Basis::default()).unwrap();
    Report { verdict, ..realistic() }
}

/// Nothing but a verdict on one arm.
fn bare() -> Report {
    let zero = ArmResult {
        correct: None,
        task_kl: None,
        nll: losses(2.0, 0.1, 1, 3),
        ..arm("zero-shot", ArmKind::ZeroShot, 2.0, 0, &[])
    };
    let verdict = judge(&[zero], &[], &Thresholds::default(), &Basis::default()).unwrap();
    let model = ModelFacts {
        name: String::new(),
        file: String::new(),
        digest: String::new(),
        parameters: 0,
        dtype: String::new(),
        mapped_bytes: 0,
    };
    let data = DataFacts {
        task: None,
        source: String::new(),
        train: (0, 0),
        valid: (0, 0),
        held_out: (0, 0),
        skipped: 0,
    };
    let (runs, scoring, samples, settings) = (vec![], vec![], vec![], vec![]);
    Report {
        title: String::new(),
        model,
        data,
        verdict,
        runs,
        scoring,
        rate_test: None,
        samples,
        settings,
        seconds: 0.0,
    }
}

/// Every figure that can be missing or no number is; every list has a length that charts find hard.
fn broken() -> Report {
    let mut r = realistic();
    let strange = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300, -1e300, 0.0, 1.0];
    for (i, arm) in r.verdict.arms.iter_mut().enumerate() {
        arm.nll = [None, Some(f64::NAN), Some(1e300)][i % 3];
        arm.accuracy = Some(f64::NAN);
        arm.task_kl = Some(strange[i]);
        for c in &mut arm.comparisons {
            (c.gain, c.lower, c.upper) = [
                (None, None, None),
                (Some(f64::NAN), Some(1.0), None),
                (Some(1e300), Some(-1e300), Some(f64::INFINITY)),
            ][i % 3];
        }
        for (j, text) in arm.retention.iter_mut().enumerate() {
            (text.delta_nll, text.kl) = [(None, Some(f64::INFINITY)), (Some(0.0), Some(0.0))][j % 2];
        }
    }
    r.verdict.thresholds.retention_kl_max = f64::INFINITY;
    r.verdict.thresholds.improvement_min = 0.01;
    let point = |step, loss: f64| CurvePoint { step, train: Some(loss), valid: Some(loss) };
    r.runs[0].curve = vec![point(5, 1.5)];
    r.runs[0].best_step = 5;
    r.runs[1].curve = (0..strange.len()).map(|i| point(i as u64 * (u64::MAX / 10), strange[i])).collect();
    r.runs[2].curve = vec![CurvePoint { step: 1, train: None, valid: None }; 3];
    r.runs.push(ArmRun {
        curve: vec![],
        seconds: 0.0,
        planned_bytes: 0,
        peak_bytes: None,
        learning_rate: f64::NAN,
        ..r.runs[0].clone()
    });
    r.runs.push(ArmRun { curve: vec![point(1, 2.0), point(1, 2.0)], ..r.runs[0].clone() });
    let rates = strange.iter().map(|x| (*x, 1.0)).chain([(1e-3, f64::NAN), (1e-3, 2.0)]);
    r.rate_test = Some(RateTest { points: rates.collect(), chosen: f64::NAN });
    r.scoring.push(Scoring {
        tokens: u64::MAX,
        prefix_tokens: u64::MAX,
        nll_seconds: f64::NAN,
        ..scoring("5-shot", 0)
    });
    r.seconds = f64::NAN;
    r
}

/// Foreign text everywhere is hostile.
fn hostile() -> Report {
    let mut text = serde_json::to_value(realistic()).unwrap();
    fn poison(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::String(s) if s != "PROMOTE" && s != "trained" && s != "zero_shot" => {
                s.push_str(HOSTILE)
            }
            serde_json::Value::Array(all) => all.iter_mut().for_each(poison),
            serde_json::Value::Object(all) => all.values_mut().for_each(poison),
            _ => {}
        }
    }
    poison(&mut text);
    serde_json::from_value(text).unwrap()
}

fn all() -> Vec<(&'static str, Report)> {
    vec![
        ("realistic", realistic()),
        ("small", small()),
        ("leaked", leaked()),
        ("bare", bare()),
        ("broken", broken()),
        ("hostile", hostile()),
    ]
}

/// What a script element of a page holds.
fn held(page: &str, id: &str) -> Value {
    let (_, rest) = page.split_once(&format!("<script type=\"application/json\" id=\"{id}\">")).unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn the_page_needs_nothing_else() {
    for word in
        ["https:", "<img", "<link", "<iframe", "<object", "url(", "@import", "src=", "href=", "fetch("]
    {
        assert!(!PAGE.contains(word), "{word}");
    }
    // The name of SVG's elements is no address that anything is loaded from.
    assert_eq!(PAGE.matches("http:").count(), PAGE.matches("\"http://www.w3.org/2000/svg\"").count());
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; \
                  form-action 'none'; require-trusted-types-for 'script'";
    assert!(PAGE.contains(&format!("http-equiv=\"Content-Security-Policy\" content=\"{policy}\"")));
    assert!(PAGE.contains("name=\"viewport\"") && PAGE.contains("charset=\"utf-8\""));
    for way in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("] {
        assert!(!PAGE.contains(way), "{way} makes markup or code of text");
    }
}

#[test]
fn the_page_holds_the_report() {
    for (name, report) in all() {
        let page = report.to_html();
        let json = serde_json::to_string_pretty(&report).unwrap();
        assert_eq!(held(&page, "report"), serde_json::from_str::<Value>(&json).unwrap(), "{name}");
        assert_eq!(held(&page, "words")["next"], report.next_step().as_str(), "{name}");
        assert_eq!(page, report.to_html(), "{name}: the same bytes each time");
        let (_, rest) = page.split_once("<noscript>").unwrap();
        let (without_scripts, _) = rest.split_once("</noscript>").unwrap();
        assert!(without_scripts.contains(&escaped(&report.verdict.sentence)), "{name}");
    }
    let slots = ["title", "decision", "sentence", "report", "words"].map(|slot| format!("{{{{{slot}}}}}"));
    let places: Vec<usize> = slots.iter().filter_map(|slot| PAGE.find(slot)).collect();
    assert!(places.len() == 5 && places.is_sorted(), "{places:?}");
    assert!(slots.iter().all(|slot| PAGE.matches(slot.as_str()).count() == 1));
    let mut report = realistic();
    report.samples[0].prompt = slots.concat();
    report.verdict.sentence = slots.concat();
    let page = report.to_html();
    assert_eq!(held(&page, "report")["samples"][0]["prompt"], slots.concat().as_str());
    assert_eq!(held(&page, "words")["heading"], report.heading().as_str());
}

#[test]
fn foreign_text_stays_text() {
    let report = hostile();
    let page = report.to_html();
    assert!(
        page.contains("&lt;/script&gt;&lt;img src=x onerror=&quot;alert(&#39;1&#39;)&quot;&gt;&amp;amp; ")
    );
    assert!(page.contains("⟨U+202E⟩txet⟨U+0085⟩⟨U+0000⟩⟨U+2028⟩"));
    assert!(page.contains(r#"\u003c/script>\u003cimg src=x onerror=\"alert('1')\">"#));
    for (name, report) in all() {
        // What is put in has none of the characters that begin a tag, so all tags are the page's own.
        assert_eq!(report.to_html().matches('<').count(), PAGE.matches('<').count(), "{name}");
    }
    for shown in [page, report.to_text(80, false), report.to_text(200, false)] {
        let acting = |c: &char| show::acts(u32::from(*c)) && *c != '\n';
        assert_eq!(shown.chars().find(acting), None);
    }
    let coloured = report.to_text(80, true);
    let escapes = coloured.split('\x1b').skip(1);
    assert!(
        escapes.into_iter().all(|e| ["[0m", "[1m", "[31m", "[32m", "[33m"].iter().any(|c| e.starts_with(c)))
    );
    let tags = "\u{e0041}\u{feff}a😀";
    assert_eq!(embedded(&tags), "\"\\udb40\\udc41\\ufeffa😀\"");
    assert_eq!(serde_json::from_str::<String>(&embedded(&tags)).unwrap(), tags);
}

#[test]
fn page_and_text_show_all() {
    let report = realistic();
    let words = held(&report.to_html(), "words").to_string();
    let text = report.to_text(100, false);
    for shown in [&words, &text] {
        for arm in &report.verdict.arms {
            assert!(shown.contains(&arm.name));
        }
        let facts = [
            "PROMOTE(dora)",
            "11.0 %",
            "412.0 MiB",
            "385.0 MiB",
            "93.4 %",
            "(above)",
            "279",
            "30:34 min",
            "134,515,008",
            "2e-4",
            "7,073 rows, 812,345 targets",
            "eligible, not the best",
            "shots chosen by",
        ];
        for fact in facts {
            assert!(shown.contains(fact), "{fact}");
        }
    }
    for fact in ["Next: ", "✓ right", "✗ wrong", "(nothing)", "#### 72"] {
        assert!(text.contains(fact), "{fact}");
    }
    let first = |answer: &str| text.find(answer).unwrap_or(usize::MAX);
    assert!(first("96 clips") < first("She sold"), "the base alone answers first");
    for reason in report.verdict.reasons.iter().filter(|r| **r != report.verdict.sentence) {
        assert!(words.contains(reason), "{reason}");
    }
}

#[test]
fn what_is_missing_is_not_shown() {
    let words = bare().words();
    for table in ["forgetting", "runs", "memory", "scoring"] {
        assert_eq!(words[table]["rows"], json!([]), "{table}");
    }
    assert_eq!((&words["caveat"], &words["seconds"]), (&Value::Null, &show::DASH.into()));
    assert!(words["next"].as_str().is_some_and(|next| next.contains("Hold out at least")));
    let told = words.to_string();
    assert!(told.contains("Undecided") && !told.contains("Leak") && !told.contains("\"Settings\""));
    let text = bare().to_text(80, false);
    assert!(!text.contains("Samples") && !text.contains("Accuracy") && text.contains("KEEP_BASE"));
    let small = small().words();
    assert!(!small["arms"].to_string().contains("Accuracy") && small["forgetting"]["rows"][0].is_array());
}

#[test]
fn the_next_step_fits_the_verdict() {
    let step = Report::next_step;
    assert!(step(&realistic()).contains("in the store"));
    assert!(step(&leaked()).starts_with("Split the data"));
    let mut r = realistic();
    r.verdict.decision = Decision::KeepPrompting { arm: "5-shot".into(), k: 5 };
    assert!(step(&r).starts_with("Put the same 5 examples"));
    r.verdict.decision = Decision::KeepBase;
    r.verdict.arms[2].retention[0].kl = Some(0.7);
    for way in ["penalty", "fewer steps", "learning rate", "replayed"] {
        assert!(step(&r).contains(way), "{}", step(&r));
    }
    let mut r = realistic();
    r.verdict.decision = Decision::KeepBase;
    for arm in &mut r.verdict.arms {
        arm.eligible = false;
        arm.comparisons.iter_mut().filter_map(|c| c.accuracy.as_mut()).for_each(|a| a.better = false);
    }
    for (needed, words) in [(Some(1234), "About 1,234 held-out rows"), (None, "There is no lead")] {
        for arm in &mut r.verdict.arms {
            arm.comparisons
                .iter_mut()
                .filter_map(|c| c.accuracy.as_mut())
                .for_each(|a| a.examples_to_decide = needed);
        }
        let told = step(&r);
        assert!(told.contains("isn't shown to give more of them") && told.contains(words), "{told}");
    }
    let told = outcome::outcome(&r.verdict, &r.verdict.arms[2]);
    assert_eq!(told, "not shown to solve more than zero-shot");
    let told = leaked().words().to_string();
    for words in [
        "Leak: 23 held-out rows",
        "void: held-out rows leaked",
        "and 3 more",
        "nearly equals",
        "no figure here means anything",
    ] {
        assert!(told.contains(words), "{words}");
    }
    let harmed =
        realistic().verdict.arms.iter().find(|a| a.name == "full").map(|a| outcome::outcome(&r.verdict, a));
    assert!(harmed.is_some_and(|h| h.contains("forgets: ΔNLL above 0.03 on built-in, letters.txt")));
}

#[test]
fn text_keeps_to_its_width() {
    for (name, report) in all() {
        for width in [0, 40, 57, 80, 132, usize::MAX] {
            let text = report.to_text(width, false);
            for line in text.lines() {
                assert!(show::columns(line) <= width.max(40), "{name}, {width}: {line}");
            }
            assert!(!text.contains("NaN") && !text.contains("inf "), "{name}");
        }
    }
    let mut wide = realistic();
    wide.samples[0].prompt = "日本語のとても長い文".repeat(40) + &"e\u{301}".repeat(500);
    wide.verdict.arms[0].name = "名前".repeat(60);
    assert!(wide.to_text(41, false).lines().all(|l| show::columns(l) <= 41));
}

/// The relative luminance of "#rrggbb", as WCAG 2 defines it.
fn luminance(colour: &str) -> f64 {
    let part = |i: usize| f64::from(u8::from_str_radix(&colour[i..i + 2], 16).unwrap()) / 255.0;
    let linear = |c: f64| if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) };
    0.2126 * linear(part(1)) + 0.7152 * linear(part(3)) + 0.0722 * linear(part(5))
}

fn contrast(a: &str, b: &str) -> f64 {
    let (a, b) = (luminance(a), luminance(b));
    (a.max(b) + 0.05) / (a.min(b) + 0.05)
}

#[test]
fn colours_have_contrast() {
    assert!((contrast("#ffffff", "#000000") - 21.0).abs() < 1e-9 && contrast("#ffffff", "#888888") < 4.5);
    let schemes: Vec<&str> = PAGE.split(" color-scheme: ").skip(1).take(2).collect();
    assert!(schemes[0].starts_with("light;") && schemes[1].starts_with("dark;"));
    for scheme in schemes {
        let value = |name: &str| &scheme.split(&format!("--{name}: ")).nth(1).unwrap()[..7];
        for back in ["paper", "panel"] {
            for (front, least) in [
                ("ink", 7.0),
                ("soft", 4.5),
                ("good", 4.5),
                ("bad", 4.5),
                ("open", 4.5),
                ("mark", 4.5),
                ("edge", 3.0),
            ] {
                let found = contrast(value(front), value(back));
                assert!(found >= least, "{front} on {back}: {found:.2}");
            }
        }
    }
}

/// Writes the samples into a folder, for whoever changes how they look.
#[test]
fn samples_can_be_looked_at() {
    let Some(folder) = std::env::var_os(LOOK_VAR) else { return };
    for (name, report) in all() {
        let file = |end: &str| std::path::Path::new(&folder).join(format!("{name}.{end}"));
        std::fs::write(file("html"), report.to_html()).unwrap();
        std::fs::write(file("txt"), report.to_text(80, false)).unwrap();
    }
}
