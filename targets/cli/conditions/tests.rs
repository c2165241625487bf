use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use super::*;

/// A machine with the readings that a test sets.
#[derive(Clone, Default)]
struct Fake(Rc<RefCell<Told>>);

#[derive(Default)]
struct Told {
    temperature: Option<f64>,
    powered: Option<bool>,
    processor: Option<Processor>,
}

impl Readings for Fake {
    fn temperature(&mut self) -> Option<f64> {
        self.0.borrow().temperature
    }

    fn powered(&mut self) -> Option<bool> {
        self.0.borrow().powered
    }

    fn processor(&mut self) -> Option<Processor> {
        self.0.borrow().processor
    }
}

fn options(only_when: &[Condition]) -> WhenOptions {
    WhenOptions {
        only_when: only_when.to_vec(),
        device: None,
        start_below: None,
        pause_above: None,
        idle_below: None,
        wait: None,
    }
}

fn watched(options: &WhenOptions, fake: &Fake) -> Conditions {
    options.watch_on(Box::new(fake.clone())).expect("the machine tells all of it")
}

#[test]
fn a_warm_machine_begins_later_than_it_pauses() {
    let fake = Fake::default();
    let at = |t: f64| fake.0.borrow_mut().temperature = Some(t);
    at(70.0);
    let mut conditions = watched(&options(&[Condition::Cool]), &fake);
    assert!(conditions.obstacle().is_some_and(|why| why.contains("70 °C; the limit is 65 °C")));
    at(64.0);
    assert_eq!(conditions.obstacle(), None);
    conditions.running = true;
    at(77.0);
    assert_eq!(conditions.obstacle(), None, "what runs may be warmer");
    at(78.0);
    assert!(conditions.obstacle().is_some());
    fake.0.borrow_mut().temperature = None;
    assert!(conditions.obstacle().is_some(), "a failed sensor isn't a licence");
}

#[test]
fn temperatures_are_the_devices_or_those_asked_for() {
    let fake = Fake::default();
    fake.0.borrow_mut().temperature = Some(30.0);
    let limits = |options: WhenOptions| {
        let limits = watched(&options, &fake).limits;
        (limits.start_c, limits.pause_c)
    };
    let cool = options(&[Condition::Cool]);
    assert_eq!(limits(cool.clone()), (65, 78));
    let phone = WhenOptions { device: Some("android-phone".into()), ..cool.clone() };
    assert_eq!(limits(phone.clone()), (35, 42));
    assert_eq!(limits(WhenOptions { pause_above: Some(40), ..phone }), (35, 40));
    let wrong = WhenOptions { start_below: Some(80), ..cool }.watch_on(Box::new(fake));
    assert_eq!(wrong.err().map(|e| e.kind()), Some(ErrorKind::Misuse));
}

#[test]
fn other_programs_count_and_this_one_does_not() {
    let fake = Fake::default();
    let used = |all, busy, own| fake.0.borrow_mut().processor = Some(Processor { all, busy, own });
    used(1000, 500, 0);
    let mut conditions = watched(&options(&[Condition::Idle]), &fake);
    assert!(conditions.obstacle().is_some(), "nothing is known yet");
    used(1400, 800, 290);
    assert_eq!(conditions.obstacle(), None, "10 of 400 are others'");
    used(1800, 1150, 440);
    assert!(conditions.obstacle().is_some_and(|why| why.contains("other programs use 50 %")));
    assert_eq!(conditions.obstacle(), None, "no time has passed");
}

#[test]
fn a_battery_stops_and_its_absence_does_not() {
    let fake = Fake::default();
    let mut conditions = watched(&options(&[Condition::Powered]), &fake);
    for (told, waits) in [(None, false), (Some(true), false), (Some(false), true)] {
        fake.0.borrow_mut().powered = told;
        assert_eq!(conditions.obstacle().is_some(), waits, "{told:?}");
    }
}

#[test]
fn what_a_machine_can_not_tell_is_refused() {
    for condition in [Condition::Cool, Condition::Idle] {
        let refused = options(&[condition]).watch_on(Box::new(Fake::default()));
        assert_eq!(refused.err().map(|e| e.kind()), Some(ErrorKind::Misuse));
    }
    assert!(options(&[Condition::Powered]).watch_on(Box::new(Fake::default())).is_ok());
}

#[test]
fn waiting_ends_by_ctrl_c_by_patience_or_by_the_machine() {
    let fake = Fake::default();
    fake.0.borrow_mut().powered = Some(false);
    let patient = options(&[Condition::Powered]);
    let stop = AtomicBool::new(true);
    let mut told = Vec::new();
    watched(&patient, &fake)
        .go_on(&stop, &mut |line| told.push(line.to_string()))
        .expect("ending it is up to the caller");
    assert_eq!(told, ["waiting: the machine runs on its battery"]);

    let (go, hurried) =
        (AtomicBool::new(false), WhenOptions { wait: Some(Duration::ZERO), ..patient.clone() });
    let mut pressed = watched(&patient, &fake);
    pressed.end_at(Some(Instant::now()));
    pressed.go_on(&go, &mut |_| ()).expect("out of time");
    let error = watched(&hurried, &fake).go_on(&go, &mut |_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.message().contains("runs on its battery"), "{}", error.message());

    fake.0.borrow_mut().powered = Some(true);
    let mut conditions = watched(&patient, &fake);
    conditions.go_on(&go, &mut |_| panic!("nothing to tell")).expect("mains power");
    // Between two checks nothing is read.
    fake.0.borrow_mut().powered = Some(false);
    conditions.go_on(&go, &mut |_| panic!("looked too soon")).expect("not looked at");
}

fn put(root: &Path, file: &str, text: &str) {
    let path = root.join(file);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    std::fs::write(path, text).expect("writing");
}

#[test]
fn linux_files_are_read() {
    let root = tempfile::tempdir().expect("a folder");
    let root = root.path();
    let mut system = System::below(root);
    assert_eq!((system.temperature(), system.powered(), system.processor()), (None, None, None));
    for (zone, temp) in [(0, "41000\n"), (1, "56500\n"), (2, "broken"), (3, "-1000")] {
        put(root, &format!("sys/class/thermal/thermal_zone{zone}/temp"), temp);
    }
    put(root, "sys/class/thermal/cooling_device0/temp", "99000");
    assert_eq!(system.temperature(), Some(56.5));

    put(root, "proc/stat", "cpu  100 20 30 1000 50 5 6 7 40 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n");
    put(root, "proc/self/stat", "42 (a (b) c) R 1 2 3 4 5 6 7 8 9 10 11 22 5 0 20\n");
    assert_eq!(system.processor(), Some(Processor { all: 1218, busy: 161, own: 33 }));

    let supply = |name: &str, field: &str, text: &str| {
        put(root, &format!("sys/class/power_supply/{name}/{field}"), text);
    };
    supply("mouse", "type", "Battery\n");
    supply("mouse", "scope", "Device\n");
    supply("mouse", "status", "Discharging\n");
    assert_eq!(system.powered(), None);
    supply("BAT0", "type", "Battery\n");
    supply("BAT0", "status", "Discharging\n");
    assert_eq!(system.powered(), Some(false));
    supply("AC", "type", "Mains\n");
    supply("AC", "online", "0\n");
    assert_eq!(system.powered(), Some(false));
    supply("AC", "online", "1\n");
    assert_eq!(system.powered(), Some(true));
}

#[cfg(target_os = "linux")]
#[test]
fn this_machine_tells_its_load() {
    let mut system = System::default();
    let before = system.processor().expect("proc_stat(5)");
    assert!(before.busy <= before.all && before.own <= before.busy, "{before:?}");
}

#[test]
fn limits_of_nothing_are_refused() {
    let of = |change: fn(&mut WhenOptions)| {
        let mut options = options(&[]);
        change(&mut options);
        options.watch_on(Box::new(Fake::default())).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(of(|_| ()), "");
    assert!(of(|o| o.start_below = Some(40)).contains("--start-below"));
    assert!(of(|o| o.pause_above = Some(90)).contains("--pause-above"));
    assert!(of(|o| o.idle_below = Some(0.5)).contains("--idle-below"));
    assert!(of(|o| o.wait = Some(Duration::from_secs(1))).contains("--wait"));
}
