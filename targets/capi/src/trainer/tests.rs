use std::ptr::null_mut;

use std::time::Instant;

use super::*;
use crate::adapter::engraft_adapter_save;
use crate::data::engraft_data_free;
use crate::error::{ENGRAFT_BUSY, ENGRAFT_MISUSE, ENGRAFT_OK};
use crate::handle::Handle;
use crate::model::engraft_model_free;
use crate::tests::{data, made, model, ok, settings, trainer};

impl Run {
    /// Makes all further steps fail.
    fn break_parameters(&mut self) {
        let numbers = self.run.trainer_mut().numbers_mut().expect("an adapter's");
        numbers.theta.fill(f32::NAN);
        *numbers.broken = false;
    }
}

/// Handles of trainers on one model.
struct World {
    model: *mut Model,
    data: *mut Data,
    trainers: Vec<*mut Trainer>,
}

impl World {
    fn new(trainers: usize) -> World {
        let model = model();
        let data = data(model);
        World { model, data, trainers: (0..trainers).map(|_| trainer(model, data)).collect() }
    }

    /// The value behind a handle.
    fn found(&self, i: usize) -> Arc<Handle<Value>> {
        handle::find(self.trainers[i]).expect("a live handle")
    }

    fn step(&self, i: usize) -> Progress {
        let mut progress: Progress = settings();
        // SAFETY: a handle, and a struct of ours.
        ok(unsafe { engraft_trainer_step(self.trainers[i], &mut progress) });
        progress
    }

    fn checkpoint(&self, i: usize, folder: &Path) -> i32 {
        let folder = folder.to_str().expect("a path in UTF-8");
        // SAFETY: the text has the length that is said.
        unsafe { engraft_trainer_checkpoint(self.trainers[i], folder.as_ptr().cast(), folder.len()) }
    }

    fn save(&self, i: usize, folder: &Path) -> i32 {
        let folder = folder.to_str().expect("a path in UTF-8");
        // SAFETY: the text has the length that is said.
        unsafe { engraft_trainer_save(self.trainers[i], folder.as_ptr().cast(), folder.len()) }
    }

    fn restore(&self, i: usize, folder: &Path) -> i32 {
        let folder = folder.to_str().expect("a path in UTF-8");
        // SAFETY: the text has the length that is said.
        unsafe { engraft_trainer_restore(self.trainers[i], folder.as_ptr().cast(), folder.len()) }
    }

    fn free(&mut self, i: usize) {
        // SAFETY: a handle.
        ok(unsafe { engraft_trainer_free(std::mem::replace(&mut self.trainers[i], null_mut())) });
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: handles.
        unsafe {
            self.trainers.iter().for_each(|trainer| ok(engraft_trainer_free(*trainer)));
            ok(engraft_data_free(self.data));
            ok(engraft_model_free(self.model));
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

#[test]
fn one_trainer_at_a_time_has_its_checkpoints_in_a_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let (own, other) = (folder.path().join("own"), folder.path().join("other"));
    let mut world = World::new(2);
    world.step(0);
    ok(world.checkpoint(0, &own));
    // The other trainer may read but not write.
    ok(world.restore(1, &own));
    assert_eq!((world.checkpoint(1, &own), world.save(1, &own)), (ENGRAFT_BUSY, ENGRAFT_BUSY));
    // SAFETY: handles, and a text of the length that is said.
    unsafe {
        let adapter = made(|out| engraft_trainer_adapter(world.trainers[1], out));
        let (text, length) = (own.to_str().expect("UTF-8").as_ptr().cast(), own.as_os_str().len());
        assert_eq!(engraft_adapter_save(adapter, text, length, 0), ENGRAFT_BUSY);
        ok(crate::adapter::engraft_adapter_free(adapter));
    }
    // The folder is open to its holder, under any name.
    ok(world.save(0, &own.join("../own")));
    world.step(0);
    ok(world.checkpoint(0, &own));
    let newest = "checkpoint-00000002.engraft".to_string();
    assert!(names(&own).contains(&newest), "{:?}", names(&own));
    let stray = own.join(".adapter.engraft-1-1.engraft-tmp");
    std::fs::write(&stray, "cut").expect("room");
    // Using another folder frees the first for others, who see what was numbered meanwhile.
    ok(world.checkpoint(0, &other));
    world.step(1);
    ok(world.checkpoint(1, &own));
    let left = ["adapter.engraft", "checkpoint-00000003.engraft", "lock"];
    let all: Vec<_> = names(&own).into_iter().filter(|name| !name.contains("-00000001")).collect();
    assert_eq!(all, left);
    assert_eq!(world.checkpoint(1, &other), ENGRAFT_BUSY);
    world.free(0);
    assert_eq!(world.checkpoint(1, &other), ENGRAFT_OK);
}

#[test]
fn a_folder_by_another_name_is_the_same_folder() {
    let (world, root) = (World::new(1), tempfile::tempdir().expect("a folder"));
    let own = root.path().join("own");
    for name in [own.clone(), own.clone(), own.join("../own")] {
        world.step(0);
        ok(world.checkpoint(0, &name));
    }
    let kept = names(&own).into_iter().filter(|name| name.starts_with("checkpoint-"));
    assert_eq!(kept.collect::<Vec<_>>(), ["checkpoint-00000002.engraft", "checkpoint-00000003.engraft"]);
}

#[test]
fn an_adapter_tells_the_held_out_loss_of_its_own_step_only() {
    let world = World::new(1);
    let told = || {
        let found = world.found(0);
        let adapter = found.value.run.enter().and_then(|mut run| run.snapshot()).expect("an adapter");
        adapter.parameters.expect("parameters").meta.valid_loss_after
    };
    world.step(0);
    assert_eq!(told(), None);
    let mut loss = 0.0;
    // SAFETY: a handle, and a number of ours.
    ok(unsafe { engraft_trainer_evaluate(world.trainers[0], &mut loss) });
    assert_eq!(told(), Some(loss as f32));
    let progress = world.step(0);
    assert_eq!(told(), None);
    // The last result is still reported.
    assert_eq!(progress.valid_loss, loss);
}

/// After three steps without a finite loss the run returns to the checkpoint; each call reports its step.
#[test]
fn a_step_that_is_none_ends_the_call_and_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(1);
    (1..=2).for_each(|n| assert_eq!(world.step(0).step, n));
    ok(world.checkpoint(0, folder.path()));
    (3..=5).for_each(|n| assert_eq!(world.step(0).step, n));
    let found = world.found(0);
    let mut seen = Vec::new();
    for _ in 0..3 {
        found.value.run.enter().expect("nobody inside").break_parameters();
        let progress = world.step(0);
        seen.push((progress.event, progress.step));
    }
    assert_eq!(seen, [(ENGRAFT_EVENT_NOTE, 5), (ENGRAFT_EVENT_NOTE, 5), (ENGRAFT_EVENT_NOTE, 2)]);
    let next = world.step(0);
    assert_eq!((next.event, next.step), (ENGRAFT_EVENT_STEP, 3));
}

#[test]
fn an_answer_that_was_not_prepared_costs_no_step() {
    let world = World::new(1);
    let mut progress: Progress = caller::zeroed();
    // SAFETY: a handle, and a struct of ours.
    assert_eq!(unsafe { engraft_trainer_step(world.trainers[0], &mut progress) }, ENGRAFT_MISUSE);
    assert_eq!(world.step(0).step, 1);
}

/// A run that is driven step by step rests from the previous step.
#[test]
fn heat_is_obeyed_by_single_steps() {
    let world = World::new(1);
    world.step(0);
    let took = world.found(0).value.run.enter().expect("nobody inside").took;
    // SAFETY: a handle.
    ok(unsafe { engraft_trainer_set_thermal(world.trainers[0], crate::control::ENGRAFT_THERMAL_SERIOUS) });
    let began = Instant::now();
    world.step(0);
    assert!(!took.is_zero() && began.elapsed() >= took, "{took:?}, {:?}", began.elapsed());
}

/// A failed restore from a folder without checkpoints leaves a run its own.
#[test]
fn a_restore_that_fails_leaves_the_run_its_checkpoints() {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(1);
    ok(world.checkpoint(0, &folder.path().join("own")));
    assert_eq!(world.restore(0, &folder.path().join("nothing")), ENGRAFT_IO);
    (1..=2).for_each(|n| assert_eq!(world.step(0).step, n));
    let found = world.found(0);
    for _ in 0..3 {
        found.value.run.enter().expect("nobody inside").break_parameters();
        assert_eq!(world.step(0).event, ENGRAFT_EVENT_NOTE);
    }
    assert_eq!(world.step(0).step, 1);
}

#[test]
fn what_a_failed_restore_left_half_filled_is_not_saved() {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(1);
    let found = world.found(0);
    let mut run = found.value.run.enter().expect("nobody inside");
    *run.run.trainer_mut().numbers_mut().expect("an adapter's").broken = true;
    drop(run);
    assert_eq!(world.save(0, &folder.path().join("it")), ENGRAFT_MISUSE);
    let mut adapter = std::ptr::without_provenance_mut(16);
    // SAFETY: a handle, and a place of ours.
    assert_eq!(unsafe { engraft_trainer_adapter(world.trainers[0], &mut adapter) }, ENGRAFT_MISUSE);
    assert!(adapter.is_null());
}
