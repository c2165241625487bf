//! Charts as inline SVG. They are drawn 360 units wide, so that their text is read at its own size on a
//! phone and somewhat larger elsewhere. Colour never tells alone: markers, dashes and words do too.

use super::super::verdict::{ArmReport, Comparison, Verdict};
use super::html::Html;
use super::outcome::zero_shot;
use super::tables::word;
use super::{ArmRun, RateTest, show};

/// Width of every drawing.
const WIDTH: f64 = 360.0;
/// Points of a line above which neighbours are averaged.
const POINTS_MAX: usize = 240;

/// A drawing with a name and a description for those who don't see it.
fn drawing(h: &mut Html, height: f64, title: &str, description: &str, body: impl FnOnce(&mut Html)) {
    let view = format!("0 0 {} {}", px(WIDTH), px(height));
    h.element("svg", &[("viewBox", &view), ("role", "img")], |h| {
        h.leaf("title", &[], title);
        h.leaf("desc", &[], description);
        body(h);
    });
}

/// A coordinate; never anything but a plain number.
fn px(x: f64) -> String {
    let x = if x.is_finite() { x.clamp(-1e4, 1e4) } else { 0.0 };
    format!("{}", (x * 10.0).round() / 10.0 + 0.0)
}

fn line(h: &mut Html, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let ends = [x1, y1, x2, y2].map(px);
    let [x1, y1, x2, y2] = ends.each_ref().map(String::as_str);
    h.void("line", &[("class", class), ("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2)]);
}

fn label(h: &mut Html, class: &str, (x, y): (f64, f64), text: &str) {
    h.leaf("text", &[("class", class), ("x", &px(x)), ("y", &px(y))], text);
}

/// Words centred on a place, and moved where they would leave the drawing.
fn centred(h: &mut Html, class: &str, (x, y): (f64, f64), words: &str) {
    let half = (3.5 * show::columns(words) as f64).min(WIDTH / 2.0);
    label(h, class, (x.clamp(half, WIDTH - half), y), words);
}

/// A line through points; one point alone is a dot.
fn path(h: &mut Html, class: &str, points: &[(f64, f64)]) {
    if let [(x, y)] = points {
        h.void("circle", &[("class", "dot"), ("cx", &px(*x)), ("cy", &px(*y)), ("r", "2")]);
        return;
    }
    let step = |(i, (x, y)): (usize, &(f64, f64))| {
        format!("{}{} {}", if i == 0 { "M" } else { "L" }, px(*x), px(*y))
    };
    let d: String = points.iter().enumerate().map(step).collect();
    h.void("path", &[("class", class), ("d", &d)]);
}

/// From values to a stretch of the drawing.
struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    /// Holds all finite values and some room around them; a stretch of no length is widened.
    fn over(values: impl Iterator<Item = f64>, (from, to): (f64, f64)) -> Scale {
        let sane = values.filter(|v| v.is_finite()).map(|v| v.clamp(-1e12, 1e12));
        let (low, high) = sane.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let room = match high - low {
            0.0 => (0.05 * high.abs()).max(0.001),
            width => 0.06 * width,
        };
        Scale { low: low - room, high: high + room, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.from + share * (self.to - self.from)
    }

    /// Round values in the range, about so many, and the decimals they need.
    fn ticks(&self, about: f64) -> (Vec<f64>, usize) {
        let rough = (self.high - self.low) / about;
        let decade = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|m| m * decade).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (self.low / step).ceil();
        let all = (0..20).map(|i| (first + f64::from(i)) * step).take_while(|t| *t <= self.high).collect();
        (all, (-step.log10().floor()).clamp(0.0, 9.0) as usize)
    }
}

fn tick(value: f64, decimals: usize) -> String {
    if value.abs() >= 1e5 { show::number(value) } else { format!("{:.decimals$}", value + 0.0) }
}

/// Rows of words, each with a lane below it for marks. Upright lines stay in the lanes, so that they never
/// cross words.
struct Lanes {
    scale: Scale,
    rows: usize,
}

impl Lanes {
    const PITCH: f64 = 34.0;

    fn over(values: impl Iterator<Item = f64>, rows: usize) -> Lanes {
        Lanes { scale: Scale::over(values, (12.0, WIDTH - 12.0)), rows }
    }

    fn height(&self) -> f64 {
        Self::PITCH * self.rows as f64 + 34.0
    }

    /// The middle of a lane.
    fn middle(row: usize) -> f64 {
        Self::PITCH * row as f64 + 23.0
    }

    fn upright(&self, h: &mut Html, class: &str, value: f64) {
        let x = self.scale.at(value);
        for row in 0..self.rows {
            line(h, class, (x, Self::middle(row) - 7.0), (x, Self::middle(row) + 8.0));
        }
    }

    fn words(&self, h: &mut Html, row: usize, name: &str, figure: &str) {
        let y = Self::middle(row) - 12.0;
        label(h, "name", (2.0, y), &show::cut(name, 30));
        label(h, "end", (WIDTH - 2.0, y), figure.trim_end());
    }

    /// The grid, the line at 0, another where there is one, and what they mean.
    fn axis(&self, h: &mut Html, dashed: Option<f64>, note: &str) {
        let bottom = Self::PITCH * self.rows as f64;
        let (ticks, decimals) = self.scale.ticks(5.0);
        for t in ticks {
            self.upright(h, "grid", t);
            centred(h, "tick middle", (self.scale.at(t), bottom + 12.0), &tick(t, decimals));
        }
        self.upright(h, "zero", 0.0);
        if let Some(value) = dashed {
            self.upright(h, "ceiling", value);
        }
        label(h, "note middle", (WIDTH / 2.0, bottom + 28.0), note);
    }
}

/// A vertical grid with its figures along the bottom.
fn grid_along(h: &mut Html, scale: &Scale, (top, bottom): (f64, f64)) {
    let (ticks, decimals) = scale.ticks(4.0);
    for t in ticks {
        line(h, "grid", (scale.at(t), top), (scale.at(t), bottom));
        centred(h, "tick middle", (scale.at(t), bottom + 13.0), &tick(t, decimals));
    }
}

// ---------------------------------------------------------------------------------------------------
// Gains with their intervals

/// The gains over a rival, one line an arm; draws nothing where no arm was compared with it.
pub(super) fn gains(h: &mut Html, verdict: &Verdict, rival: &str) {
    let against = |a: &'_ ArmReport| a.comparisons.iter().position(|c| c.against == rival);
    let rows: Vec<(&ArmReport, &Comparison)> =
        verdict.arms.iter().filter_map(|a| Some((a, &a.comparisons[against(a)?]))).collect();
    if rows.is_empty() {
        return;
    }
    let least = Some(verdict.thresholds.improvement_min).filter(|l| *l > 0.0);
    let figures = rows.iter().flat_map(|(_, c)| [c.lower, c.gain, c.upper]).flatten();
    let lanes = Lanes::over(figures.chain([0.0]).chain(least), rows.len());
    let title = format!("Gain over {}", show::one_line(rival));
    let told = |(a, c): &(&ArmReport, &Comparison)| {
        let ends = show::interval(c.lower, c.upper);
        format!("{}: {} {ends}, {}", show::one_line(&a.name), show::change(c.gain), word(c))
    };
    let description = rows.iter().map(told).collect::<Vec<_>>().join("; ");
    let note = match least {
        Some(l) => format!("nats per token; dashed: least improvement, {}", show::number(l)),
        None => "nats per token; better to the right of 0".into(),
    };
    h.element("figure", &[], |h| {
        h.leaf("figcaption", &[], &title);
        drawing(h, lanes.height(), &title, &description, |h| {
            lanes.axis(h, least, &note);
            for (row, (arm, c)) in rows.iter().enumerate() {
                lanes.words(h, row, &arm.name, &format!("{} {}", show::change(c.gain), word(c)));
                gain(h, &lanes.scale, Lanes::middle(row), c);
            }
        });
    });
}

/// An interval, and the marker of its word at the gain.
fn gain(h: &mut Html, scale: &Scale, y: f64, c: &Comparison) {
    let Some(middle) = c.gain.filter(|g| g.is_finite()) else { return };
    let class = format!("is-{}", word(c));
    h.element("g", &[("class", &class)], |h| {
        let finite = |x: Option<f64>| x.filter(|x| x.is_finite()).unwrap_or(middle);
        let [from, middle, to] = [finite(c.lower), middle, finite(c.upper)].map(|x| scale.at(x));
        line(h, "range", (from, y), (to, y));
        for end in [from, to] {
            line(h, "range", (end, y - 4.0), (end, y + 4.0));
        }
        marker(h, word(c), (middle, y));
    });
}

/// A square for better, a diamond for undecided, a cross for worse, a dot for what is not judged.
fn marker(h: &mut Html, word: &str, (x, y): (f64, f64)) {
    let corners =
        |offsets: [(f64, f64); 4]| offsets.map(|(dx, dy)| format!("{},{}", px(x + dx), px(y + dy))).join(" ");
    match word {
        "better" => {
            let points = corners([(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)]);
            h.void("polygon", &[("class", "mark"), ("points", &points)]);
        }
        "plain" => {
            h.void("circle", &[("class", "mark"), ("cx", &px(x)), ("cy", &px(y)), ("r", "4.5")]);
        }
        "worse" => {
            line(h, "cross", (x - 4.5, y - 4.5), (x + 4.5, y + 4.5));
            line(h, "cross", (x - 4.5, y + 4.5), (x + 4.5, y - 4.5));
        }
        _ => {
            let points = corners([(0.0, -6.0), (6.0, 0.0), (0.0, 6.0), (-6.0, 0.0)]);
            h.void("polygon", &[("class", "mark hollow"), ("points", &points)]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------
// Forgetting

/// The charts of forgetting: one for each measure that was taken.
pub(super) fn forgetting(h: &mut Html, verdict: &Verdict) {
    let t = &verdict.thresholds;
    let mut panels = [
        ("Retention: change in NLL", Some(t.retention_nll_max), vec![]),
        ("Retention: KL(tuned‖base)", Some(t.retention_kl_max), vec![]),
        ("Held-out task: KL(tuned‖base)", t.task_kl_max, vec![]),
    ];
    for arm in &verdict.arms {
        for r in &arm.retention {
            let name = format!("{} · {}", arm.name, r.text);
            panels[0].2.push((name.clone(), r.delta_nll));
            panels[1].2.push((name, r.kl));
        }
        if arm.task_kl.is_some() {
            panels[2].2.push((arm.name.clone(), arm.task_kl));
        }
    }
    for (title, ceiling, rows) in panels.iter().filter(|(_, _, rows)| !rows.is_empty()) {
        amounts(h, title, rows, ceiling.filter(|c| c.is_finite()));
    }
}

/// Bars from 0 with a marker at their end, and the ceiling across them.
fn amounts(h: &mut Html, title: &str, rows: &[(String, Option<f64>)], ceiling: Option<f64>) {
    let lanes = Lanes::over(rows.iter().filter_map(|r| r.1).chain([0.0]).chain(ceiling), rows.len());
    let relation = |value: Option<f64>| match (value.filter(|v| v.is_finite()), ceiling) {
        (None, _) => "no number",
        (Some(_), None) => "",
        (Some(v), Some(c)) => {
            if v <= c {
                "within"
            } else {
                "above"
            }
        }
    };
    let figure = |value: Option<f64>| format!("{} {}", show::nats(value), relation(value));
    let told =
        |(name, value): &(String, Option<f64>)| format!("{}: {}", show::one_line(name), figure(*value));
    let limit = ceiling.map_or("no ceiling".to_string(), |c| format!("ceiling {}", show::number(c)));
    let description = rows.iter().map(told).chain([limit.clone()]).collect::<Vec<_>>().join("; ");
    let note = match ceiling {
        Some(_) => format!("nats per token; dashed: {limit}"),
        None => format!("nats per token; {limit}"),
    };
    h.element("figure", &[], |h| {
        h.leaf("figcaption", &[], title);
        drawing(h, lanes.height(), title, &description, |h| {
            lanes.axis(h, ceiling, &note);
            for (row, (name, value)) in rows.iter().enumerate() {
                lanes.words(h, row, name, &figure(*value));
                let Some(v) = value.filter(|v| v.is_finite()) else { continue };
                let word = match relation(*value) {
                    "above" => "worse",
                    "within" => "better",
                    _ => "plain",
                };
                let (from, to, y) = (lanes.scale.at(0.0), lanes.scale.at(v), Lanes::middle(row));
                h.element("g", &[("class", &format!("is-{word}"))], |h| {
                    line(h, "bar", (from, y), (to, y));
                    marker(h, word, (to, y));
                });
            }
        });
    });
}

// ---------------------------------------------------------------------------------------------------
// Losses along the way

/// One chart a run. All have one scale, so that they can be compared, unless that would flatten one.
pub(super) fn curves(h: &mut Html, runs: &[ArmRun]) {
    let losses = |run: &ArmRun| {
        let all: Vec<f64> = run.curve.iter().flat_map(|p| [p.train, p.valid]).flatten().collect();
        all.into_iter().filter(|l| l.is_finite()).collect::<Vec<f64>>()
    };
    let drawn: Vec<(&ArmRun, Vec<f64>)> =
        runs.iter().map(|r| (r, losses(r))).filter(|(_, l)| !l.is_empty()).collect();
    let width = |l: &[f64]| {
        let scale = Scale::over(l.iter().copied(), (0.0, 1.0));
        scale.high - scale.low
    };
    let all: Vec<f64> = drawn.iter().flat_map(|(_, l)| l.iter().copied()).collect();
    let narrowest = drawn.iter().map(|(_, l)| width(l)).fold(f64::INFINITY, f64::min);
    let shared = width(&all) <= 4.0 * narrowest;
    for (run, own) in &drawn {
        curve(h, run, if shared { &all } else { own });
    }
}

fn curve(h: &mut Html, run: &ArmRun, losses: &[f64]) {
    let (left, right, top, bottom) = (44.0, WIDTH - 10.0, 42.0, 202.0);
    let steps = run.curve.iter().map(|p| p.step as f64);
    let x = Scale::over(steps.chain([0.0]), (left, right));
    let y = Scale::over(losses.iter().copied(), (bottom, top));
    let place =
        |step: u64, loss: Option<f64>| loss.filter(|l| l.is_finite()).map(|l| (x.at(step as f64), y.at(l)));
    let train: Vec<_> = run.curve.iter().filter_map(|p| place(p.step, p.train)).collect();
    let valid: Vec<_> = run.curve.iter().filter_map(|p| place(p.step, p.valid)).collect();
    let best = run.curve.iter().find(|p| p.step == run.best_step && p.valid.is_some_and(f64::is_finite));
    let told = best.map(|p| format!("best at step {}: {}", show::count(p.step), show::nats(p.valid)));
    let title = format!("Losses of {}", show::one_line(&run.arm));
    let last = |of: fn(&super::CurvePoint) -> Option<f64>| show::nats(run.curve.iter().rev().find_map(of));
    let description = format!(
        "{} points; last training loss {}, last validation loss {}; {}",
        run.curve.len(),
        last(|p| p.train),
        last(|p| p.valid),
        told.as_deref().unwrap_or("no best step drawn")
    );
    h.element("figure", &[], |h| {
        h.leaf("figcaption", &[], &title);
        drawing(h, bottom + 32.0, &title, &description, |h| {
            frame(h, (&x, &y), (left, right, top, bottom));
            grid_along(h, &x, (top, bottom));
            legend(h, &[("thin", "training", !train.is_empty()), ("bold", "validation", !valid.is_empty())]);
            path(h, "thin", &thinned(&train));
            path(h, "bold", &thinned(&valid));
            for (cx, cy) in thinned(&valid) {
                h.void("circle", &[("class", "dot"), ("cx", &px(cx)), ("cy", &px(cy)), ("r", "2.6")]);
            }
            if let Some((at, told)) = best.and_then(|p| place(p.step, p.valid)).zip(told.as_deref()) {
                line(h, "best", (at.0, top - 3.0), (at.0, bottom));
                h.void("circle", &[("class", "ring"), ("cx", &px(at.0)), ("cy", &px(at.1)), ("r", "5.5")]);
                centred(h, "strong middle", (at.0, top - 7.0), told);
            }
            label(h, "note middle", (WIDTH / 2.0, bottom + 28.0), "steps; losses in nats per target");
        });
    });
}

/// The left scale and the lines of the frame.
fn frame(h: &mut Html, (_, y): (&Scale, &Scale), (left, right, _, bottom): (f64, f64, f64, f64)) {
    let (ticks, decimals) = y.ticks(4.0);
    for t in ticks {
        line(h, "grid", (left, y.at(t)), (right, y.at(t)));
        label(h, "tick end", (left - 5.0, y.at(t) + 4.0), &tick(t, decimals));
    }
    line(h, "zero", (left, bottom), (right, bottom));
}

/// What the lines mean, above them.
fn legend(h: &mut Html, entries: &[(&'static str, &str, bool)]) {
    let mut x = 44.0;
    for (class, name, _) in entries.iter().filter(|e| e.2) {
        path(h, class, &[(x, 14.0), (x + 26.0, 14.0)]);
        if *class == "bold" {
            h.void("circle", &[("class", "dot"), ("cx", &px(x + 13.0)), ("cy", "14"), ("r", "2.6")]);
        }
        label(h, "", (x + 32.0, 18.0), name);
        x += 110.0;
    }
}

/// At most about [`POINTS_MAX`] points: neighbours are averaged.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let bucket = points.len().div_ceil(POINTS_MAX).max(1);
    let mean = |p: &[(f64, f64)]| {
        let n = p.len() as f64;
        (p.iter().map(|p| p.0).sum::<f64>() / n, p.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(bucket).map(mean).collect()
}

/// The range test: smoothed loss over the rate's logarithm, and the rate that was chosen.
pub(super) fn rates(h: &mut Html, test: &RateTest) {
    let sane = |p: &&(f64, f64)| (1e-12..1e3).contains(&p.0) && p.1.is_finite();
    let points: Vec<(f64, f64)> = test.points.iter().filter(sane).map(|p| (p.0.log10(), p.1)).collect();
    if points.is_empty() {
        return;
    }
    let (left, right, top, bottom) = (44.0, WIDTH - 10.0, 22.0, 182.0);
    let chosen = (1e-12..1e3).contains(&test.chosen).then(|| test.chosen.log10());
    let x = Scale::over(points.iter().map(|p| p.0).chain(chosen), (left, right));
    let (points, ceiling) = until_divergence(points);
    let y = Scale::over(points.iter().map(|p| p.1.min(ceiling)), (bottom, top));
    let title = "Learning rate range test";
    let words = format!("chosen: {}", show::number(test.chosen));
    let description = format!("Smoothed training loss at {} rates; {words}", points.len());
    h.element("figure", &[], |h| {
        h.leaf("figcaption", &[], title);
        drawing(h, bottom + 32.0, title, &description, |h| {
            frame(h, (&x, &y), (left, right, top, bottom));
            for rate in rate_ticks(&x) {
                line(h, "grid", (x.at(rate.log10()), top), (x.at(rate.log10()), bottom));
                centred(h, "tick middle", (x.at(rate.log10()), bottom + 13.0), &format!("{rate:.0e}"));
            }
            let line_of: Vec<_> = points.iter().map(|p| (x.at(p.0), y.at(p.1))).collect();
            path(h, "bold", &thinned(&line_of));
            if let Some(chosen) = chosen {
                line(h, "best", (x.at(chosen), top), (x.at(chosen), bottom));
                centred(h, "strong middle", (x.at(chosen), top - 6.0), &words);
            }
            label(h, "note middle", (WIDTH / 2.0, bottom + 28.0), "learning rate; loss in nats per target");
        });
    });
}

/// The points up to the first that is far above where the losses began, and that bound: beyond it the run
/// diverges, and its losses would flatten all that matters.
fn until_divergence(mut points: Vec<(f64, f64)>) -> (Vec<(f64, f64)>, f64) {
    let first = points.first().map_or(0.0, |p| p.1);
    let lowest = points.iter().map(|p| p.1).fold(first, f64::min);
    let ceiling = if first > lowest { first + (first - lowest) } else { f64::INFINITY };
    let end = points.iter().position(|p| p.1 > ceiling).map_or(points.len(), |i| i + 1);
    points.truncate(end);
    (points, ceiling)
}

/// Powers of ten in a scale of logarithms; with their doubles and fives where they are too few.
fn rate_ticks(x: &Scale) -> Vec<f64> {
    let decades = x.low.floor() as i32..=x.high.ceil() as i32;
    let inside = |r: &f64| (x.low..=x.high).contains(&r.log10());
    let tens: Vec<f64> = decades.clone().map(|d| 10f64.powi(d)).filter(inside).collect();
    if tens.len() >= 2 {
        return tens.iter().copied().step_by(tens.len().div_ceil(6)).collect();
    }
    decades.flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d))).filter(inside).collect()
}

/// The rivals that arms were compared with: zero-shot first.
pub(super) fn rivals(verdict: &Verdict) -> Vec<&str> {
    let mut found: Vec<&str> = zero_shot(verdict).into_iter().collect();
    for c in verdict.arms.iter().flat_map(|a| &a.comparisons) {
        if !found.contains(&c.against.as_str()) {
            found.push(&c.against);
        }
    }
    found
}
