use super::*;

/// Completions, and the canonical form of the answer in them.
const ANSWERS: &[(&str, Option<&str>)] = &[
    // After the mark of GSM8K.
    ("Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", Some("72")),
    ("#### 1,234", Some("1234")),
    ("####72", Some("72")),
    ("#### $18.00", Some("18")),
    ("#### \\$18", Some("18")),
    ("#### 25%", Some("25")),
    ("#### 12.50\\%", Some("12.5")),
    ("#### -5", Some("-5")),
    ("#### - 5", Some("-5")),
    ("#### −5", Some("-5")),
    ("#### -$3.20", Some("-3.2")),
    ("#### 5.", Some("5")),
    ("#### 3/4", Some("0.75")),
    ("#### 1/3", Some("1/3")),
    ("#### 10 apples (of 24)", Some("10")),
    ("#### x = 5", Some("5")),
    ("#### 3 * 4 = 12", Some("12")),
    ("####\n42\n", Some("42")),
    ("#### **42**", Some("42")),
    ("#### `42`", Some("42")),
    ("#### \\boxed{42}", Some("42")),
    ("#### 42 \n\n#### 43", Some("43")),
    ("#### Step 1\nWe add 2 and 2.\n#### Step 2\nDone.\n#### 4", Some("4")),
    ("##### 7", Some("7")),
    ("### 7\nthen 8", Some("8")),
    ("#### none\nThe answer is 7", Some("7")),
    ("#### \nQuestion: What is 3 + 4?\nAnswer: 7\n#### 7", None),
    ("5 apples\n#### 5\n\nQuestion: next 9\n#### 9", Some("5")),
    ("#### 70,000 dollars", Some("70000")),
    ("#### 1 234", Some("1")),
    ("#### 1\u{202f}234", Some("1234")),
    ("#### 1.234.567", Some("1234567")),
    ("#### 2 million", Some("2000000")),
    ("#### 1.5e3", Some("1500")),
    ("#### €5,50", Some("5")),
    // After the words.
    ("The answer is 5.", Some("5")),
    ("So the final answer is: 5", Some("5")),
    ("THE ANSWER IS 5!", Some("5")),
    ("The answer is 5. She has 3 left.", Some("5")),
    ("The answer is $1,000.50 in all.", Some("1000.5")),
    ("The answer is x = 5", Some("5")),
    ("The answer is 3 + 5 = 8 apples.", Some("8")),
    ("The answer is \\boxed{\\frac{3}{4}}.", Some("0.75")),
    ("The answer is:\n\n12", Some("12")),
    ("The answer is simple. It is 12.", Some("12")),
    ("The answer is 4. No, wait, the answer is 6.", Some("6")),
    ("The answer isn't 5 but 7 or 8", Some("8")),
    ("The answer is **-7** degrees", Some("-7")),
    ("The answer is \\(\\frac{7}{3}\\).", Some("7/3")),
    ("The answer is 2 1/2 cups.", Some("2.5")),
    ("The answer is five, of 9 in all.", Some("9")),
    // In a box.
    ("$$\\boxed{42}$$ after 3 steps", Some("42")),
    ("\\boxed{x = 5}, for 7 people", Some("5")),
    ("\\boxed{\\text{about } 1{,}000} 3", Some("1000")),
    ("\\boxed{\\$5.00} 3", Some("5")),
    ("\\boxed{-\\dfrac{1}{2}} 3", Some("-0.5")),
    ("\\boxed{1} then \\boxed{2} for 9", Some("2")),
    ("\\boxed{1} then \\boxed{none} for 9", Some("1")),
    ("\\boxed{12\\%} of 50", Some("12")),
    ("\\boxed{7", Some("7")),
    // The last number.
    ("She has 3 + 4 = 7 apples.", Some("7")),
    ("It costs $4.50.", Some("4.5")),
    ("72", Some("72")),
    ("145.0", Some("145")),
    ("0.30", Some("0.3")),
    (".5", Some("0.5")),
    ("-0", Some("0")),
    ("between 10–15", Some("15")),
    ("x=5kg", Some("5")),
    ("答案是12。", Some("12")),
    ("He drinks H2O", None),
    ("It is 5/0", None),
    ("", None),
    ("####", None),
    ("The answer is", None),
    ("I don't know.", None),
    ("\\boxed{}", None),
    ("- ", None),
    ("$%.,-−/", None),
];

#[test]
fn answers_are_extracted_as_documented() {
    assert!(ANSWERS.len() >= 60, "{}", ANSWERS.len());
    for (text, expected) in ANSWERS {
        let found = extract(text).map(|n| n.to_string());
        assert_eq!(found.as_deref(), *expected, "{text:?}");
    }
}

#[test]
fn equal_values_are_equal_answers() {
    for (a, b, equal) in [
        ("#### 0.3", "#### 3/10", true),
        ("The answer is 1,000.", "#### 1000.00", true),
        ("\\boxed{\\frac{10}{4}}", "2.5", true),
        ("0.33", "1/3", false),
        ("-5", "5", false),
        ("100000000000000000000000000000000000001", "100000000000000000000000000000000000002", false),
        ("50%", "0.5", false),
        ("none", "5", false),
    ] {
        assert_eq!(Task::Gsm8k.is_correct(a, b), Some(equal), "{a} {b}");
    }
    assert_eq!(Task::Gsm8k.is_correct("5", "none"), None);
}

#[test]
fn hostile_answers_end() {
    let nines = "9".repeat(200_000);
    assert_eq!(extract(&format!("#### {nines}")), None);
    assert_eq!(extract(&format!("5 #### {nines}")).unwrap().to_string(), "5");
    for part in [
        "####",
        "#### ",
        "####\n",
        "answer is ",
        "\\boxed{",
        "}",
        "{",
        "=",
        "\\boxed{=1",
        "####=",
        ". ",
        "\n",
        "a",
        "-",
        "−$",
    ] {
        let _ = extract(&part.repeat(50_000));
    }
    let _ = extract(&format!("{}1", "\\boxed{".repeat(20_000)));
    let _ = extract(&format!("{}{}", "\\boxed{".repeat(20_000), "}".repeat(20_000)));
}

#[test]
fn names_are_those_of_the_command_line() {
    for task in Task::ALL {
        assert_eq!(Task::from_name(task.name()).unwrap(), task);
    }
    let error = Task::from_name("math").unwrap_err();
    assert!(error.kind() == ErrorKind::Misuse && error.message().contains("gsm8k, orca-math, svamp"));
}

#[test]
fn prompts_differ_by_their_examples_alone() {
    let shots = [Solved { question: "1+1? ".into(), answer: "#### 2".into() }];
    let (zero, one) = (Task::Gsm8k.chat(&[], " 2+2?"), Task::Gsm8k.chat(&shots, "2+2?"));
    let roles = |turns: &[Message]| turns.iter().map(|t| t.role.clone()).collect::<Vec<_>>().join(" ");
    assert_eq!((roles(&zero), roles(&one)), ("system user".into(), "system user assistant user".into()));
    assert_eq!((&zero[0], &zero[1]), (&one[0], &one[3]));
    assert_eq!(one[2], Message::new("assistant", "#### 2"));
    assert_eq!(Task::Gsm8k.chat(&shots, "other")[..3], one[..3], "a prefix that can be kept");
    let plain = Task::Svamp.plain(&shots, "2+2?");
    assert!(plain.ends_with("\n\nQuestion: 1+1?\nAnswer: #### 2\n\nQuestion: 2+2?\nAnswer:"), "{plain}");
    assert!(Task::Svamp.plain(&[], "2+2?").starts_with(Task::Svamp.instruction()));
    assert_eq!(roles(&Task::OrcaMath.taught(&shots[0])), "system user assistant");
}

#[test]
fn rows_of_all_three_are_read() {
    let row = |task: Task, text: &str| task.row(&serde_json::from_str(text).unwrap());
    let solved = |q: &str, a: &str| Solved { question: q.into(), answer: a.into() };
    assert_eq!(
        row(Task::Gsm8k, r#"{"question":"q","answer":"a\n#### 5"}"#).unwrap(),
        solved("q", "a\n#### 5")
    );
    let svamp = r#"{"Body":"There are 87 oranges","Question":"How many?","Answer":145.0,"Equation":"x"}"#;
    assert_eq!(row(Task::Svamp, svamp).unwrap(), solved("There are 87 oranges. How many?", "#### 145"));
    assert_eq!(row(Task::OrcaMath, r#"{"question":"q","answer":"7"}"#).unwrap().answer, "The answer is 7.");
    for bad in [r#"{"question":"q"}"#, r#"{"answer":"5"}"#, r#"{"question":"q","answer":"none"}"#, "[]", "5"]
    {
        assert_eq!(row(Task::Svamp, bad).unwrap_err().kind(), ErrorKind::BadData, "{bad}");
    }
}

/// The data set's own rule, what stands behind `####` without commas, on all of its answers.
#[test]
fn the_answers_of_gsm8k_are_read_as_its_authors_do() {
    let default = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let root = std::env::var_os("ENGRAFT_SHARED").map_or(default, std::path::PathBuf::from);
    let path = root.join("data/gsm8k/test.jsonl");
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("SKIPPED: {} is absent; set ENGRAFT_SHARED to the folder that holds data/", path.display());
        return;
    };
    for line in text.lines() {
        let row = Task::Gsm8k.row(&serde_json::from_str(line).unwrap()).unwrap();
        let gold = row.answer.rsplit("#### ").next().unwrap().replace(',', "");
        let found = extract(&row.answer).unwrap().to_string();
        assert_eq!(found, gold.trim(), "{}", row.answer);
    }
}
