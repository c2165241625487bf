//! What `adapt` does to find something worth keeping: few rows in turns, going on with what there is.

use engraft_runtime::adapter::Adapter;

use super::{assert_refused, engraft, last_line, result_of, seedling, shipped, stderr};

/// Forty rows in one file: four would be held out, so each is in its turn; ten rows can't decide even so.
#[test]
fn few_rows_are_held_out_in_turns() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, rows) = (seedling(), shipped("demo/private_train.jsonl"));
    let store = folder.path().join("store").display().to_string();
    let few = folder.path().join("few.jsonl");
    let text = std::fs::read_to_string(&rows).expect("the demo's rows");
    std::fs::write(&few, text.lines().take(10).collect::<Vec<_>>().join("\n")).expect("writing");
    let few = few.display().to_string();
    let adapt = |data: &str, more: &[&str]| -> Vec<String> {
        let words = [
            "adapt",
            "-m",
            &model,
            "--data",
            data,
            "--store",
            &store,
            "-t",
            "2",
            "-k",
            "2",
            "--samples",
            "0",
        ];
        words.iter().chain(more).map(|word| (*word).to_string()).collect()
    };
    let of = |words: &[String]| engraft(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let refused = adapt(&few, &[]);
    let refused: Vec<&str> = refused.iter().map(String::as_str).collect();
    assert_refused(&refused, 4, "gate_refused", &["10 held-out rows can't decide; it takes 20"]);

    let how = ["--iters", "12", "--resamples", "500", "--keep-general", "off", "--json"];
    let output = of(&adapt(&rows, &how));
    let told = stderr(&output);
    assert!(output.status.code().is_some_and(|code| [0, 4].contains(&code)), "{told}");
    for words in
        ["few rows: each is held out in one of 5 turns", "to decide: 40 rows", "turn 5 of 5", "on all rows"]
    {
        assert!(told.contains(words), "{words}: {told}");
    }
    assert!(last_line(&output)["losses"].as_array().is_some_and(|losses| losses.len() == 3), "{told}");
    let alone = adapt(&rows, &["--folds", "0"]);
    let alone: Vec<&str> = alone.iter().map(String::as_str).collect();
    assert_refused(&alone, 4, "gate_refused", &["4 held-out rows can't decide", "200 rows in all"]);
    let both = folder.path().join("both");
    std::fs::create_dir(&both).expect("a folder");
    for part in ["train", "test"] {
        std::fs::copy(&rows, both.join(format!("{part}.jsonl"))).expect("copying");
    }
    let both = adapt(&both.display().to_string(), &["--folds", "3"]);
    assert_refused(
        &both.iter().map(String::as_str).collect::<Vec<_>>(),
        2,
        "usage",
        &["--folds", "test.jsonl"],
    );
    let odd = adapt(&rows, &["--folds", "1"]);
    assert_refused(&odd.iter().map(String::as_str).collect::<Vec<_>>(), 2, "usage", &["--folds"]);
}

#[test]
fn training_and_adapting_go_on_with_an_adapter() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, rows) = (seedling(), shipped("demo/private_train.jsonl"));
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (first, second, store) = (place("first"), place("second"), place("store"));
    let train = |more: &[&str]| -> serde_json::Value {
        let words = ["train", "-m", &model, "--data", &rows, "-t", "2", "-b", "4"];
        result_of(&[&words[..], more].concat())
    };
    train(&["--iters", "6", "--rank", "4", "-lr", "2e-3", "--adapter-path", &first]);
    let further = train(&["--iters", "4", "--from", &first, "-lr", "1e-3", "--adapter-path", &second]);
    let load = |place: &str| Adapter::load(place.as_ref()).expect("an adapter");
    assert_eq!((load(&second).meta.steps, load(&second).config.rank), (10, 4));
    let before = f64::from(load(&first).meta.valid_loss_after.expect("a loss"));
    let began = further["valid_loss_before"].as_f64().expect("a loss");
    assert!((began - before).abs() < 1e-3, "{began} where {before} was left");

    let refused = |more: &[&str], words: &[&str]| {
        let line = ["train", "-m", &model, "--data", &rows, "--iters", "1", "--adapter-path", &second];
        assert_refused(&[&line[..], more].concat(), 2, "usage", words);
    };
    refused(&["--from", &first, "--rank", "16"], &["--rank", "--from"]);
    refused(&["--from", &first, "--lora-modules", "q"], &["--lora-modules"]);
    refused(&["--from", &second], &["overwritten", "--adapter-path"]);
    refused(&["--from", &first, "--protect", "general"], &["--protect"]);
    refused(&["--from", &first, "--fine-tune-type", "full"], &["--from"]);
    let plan = result_of(&["plan", "-m", &model, "--from", &first]);
    assert!(plan["fits"] == true, "{plan}");

    let data = folder.path().join("data");
    std::fs::create_dir(&data).expect("a folder");
    for part in ["train", "test"] {
        let rows = shipped(&format!("demo/private_{part}.jsonl"));
        std::fs::copy(rows, data.join(format!("{part}.jsonl"))).expect("copying");
    }
    let data = data.display().to_string();
    let adapt =
        ["adapt", "-m", &model, "--data", &data, "-t", "2", "-b", "4", "-k", "2", "--resamples", "500"];
    let kept = ["--store", &store, "--samples", "0", "--keep-general", "off", "--json"];
    let output = engraft(&[&adapt[..], &kept, &["--from", &second, "--iters", "30", "-lr", "2e-3"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("LoRA, rank 4"), "{}", stderr(&output));
    // Rows that the adapter may have seen decide nothing about it.
    let turns = ["adapt", "-m", &model, "--data", &rows, "--store", &store, "--from", &first];
    assert_refused(&turns, 2, "usage", &["--from", "test.jsonl"]);
    // From the store's active one, and by the kind that it is.
    let more = [&adapt[..], &kept, &["--from", &store, "--iters", "2"]].concat();
    let output = engraft(&more);
    assert!(output.status.code().is_some_and(|code| [0, 4].contains(&code)), "{}", stderr(&output));
    let other = [&adapt[..], &kept[..4], &["--from", &store, "--arms", "dora"]].concat();
    assert_refused(&other, 2, "usage", &["--from", "lora"]);
}

/// Without protection, too, what forgets too much is weakened before it is judged.
#[test]
fn strength_is_chosen_without_protection() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, rows) = (seedling(), shipped("demo/private_train.jsonl"));
    let store = folder.path().join("store").display().to_string();
    let words =
        ["adapt", "-m", &model, "--data", &rows, "--store", &store, "-t", "2", "--folds", "0", "-k", "2"];
    let how =
        ["--valid-fraction", "0.5", "--protect", "off", "--iters", "10", "-lr", "4e-3", "--samples", "0"];
    let output = engraft(&[&words[..], &how].concat());
    assert!(stderr(&output).contains("of its strength: on set aside: text"), "{}", stderr(&output));
}

/// A prompt holds as many examples as the model's context does; where it holds none, `adapt` goes on without them.
#[test]
fn examples_that_do_not_fit_become_fewer() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows = |name: &str, words: usize| {
        let row = |i: usize| {
            let long = format!("call number {i} {}", "please ".repeat(words));
            serde_json::json!({"prompt": long, "completion": format!("lamp {i}")}).to_string()
        };
        let data = folder.path().join(name);
        std::fs::create_dir(&data).expect("a folder");
        for (part, rows) in [("train", 0..12), ("test", 20..42)] {
            std::fs::write(data.join(format!("{part}.jsonl")), rows.map(row).collect::<Vec<_>>().join("\n"))
                .expect("writing");
        }
        data.display().to_string()
    };
    for (name, words, told) in
        [("longish", 40, "are used"), ("long", 130, "nor one: examples in the prompt are left out")]
    {
        let (model, data) = (seedling(), rows(name, words));
        let store = folder.path().join(format!("{name}-store")).display().to_string();
        let adapt = ["adapt", "-m", &model, "--data", &data, "--store", &store, "-t", "2", "--iters", "2"];
        let output = engraft(&[&adapt[..], &["--samples", "0", "--resamples", "500", "--json"]].concat());
        let said = stderr(&output);
        assert!(
            said.contains("context of 256 tokens doesn't hold 5 examples") && said.contains(told),
            "{said}"
        );
        assert!(output.status.code().is_some_and(|code| [0, 4].contains(&code)), "{said}");
        let arms = last_line(&output)["losses"].as_array().map(Vec::len);
        assert_eq!(arms, Some(if name == "long" { 2 } else { 3 }), "{said}");
    }
}

/// One short row a step: the ordinary rows beside it need no more memory than planned for.
#[test]
fn protection_works_with_one_row_a_step() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), folder.path().join("rows.jsonl"));
    let rows: String = (0..6).map(|i| format!("{{\"text\": \"row {i}\"}}\n")).collect();
    std::fs::write(&data, rows).expect("writing");
    let (data, out) = (data.display().to_string(), folder.path().join("out").display().to_string());
    for batch in ["1", "2"] {
        let words = ["train", "-m", &model, "--data", &data, "--adapter-path", &out, "--protect", "general"];
        let trained = result_of(&[&words[..], &["--iters", "4", "-t", "2", "-b", batch]].concat());
        assert_eq!(trained["steps"], 4, "{trained}");
        super::assert_within_plan(&trained);
        std::fs::remove_dir_all(&out).expect("removing");
    }
}
