//! What Linux reports about the machine in /proc and /sys. For formats see proc_stat(5), proc_pid_stat(5), and
//! the kernel's Documentation/ABI for sysfs-class-thermal and sysfs-class-power.

use std::path::{Path, PathBuf};

/// Readings of a machine; tests supply their own.
pub(crate) trait Readings {
    /// The warmest sensor, in degrees Celsius; `None` if none can be read.
    fn temperature(&mut self) -> Option<f64>;
    /// Whether the machine has mains power; `None` if unknown, as on machines without a battery.
    fn powered(&mut self) -> Option<bool>;
    /// Processor time since the machine started.
    fn processor(&mut self) -> Option<Processor>;
}

/// Processor time, in the kernel's ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Processor {
    /// Of all processors, idle or not.
    pub(crate) all: u64,
    /// The part that programs and the kernel used.
    pub(crate) busy: u64,
    /// The part that this process used.
    pub(crate) own: u64,
}

impl Processor {
    /// The share of all processors that others used since then; `None` if no time has passed.
    pub(crate) fn used_by_others_since(&self, before: &Processor) -> Option<f64> {
        let all = self.all.saturating_sub(before.all);
        let busy = self.busy.saturating_sub(before.busy);
        let own = self.own.saturating_sub(before.own);
        (all > 0).then(|| busy.saturating_sub(own) as f64 / all as f64)
    }
}

/// This machine.
pub(crate) struct System {
    root: PathBuf,
}

impl Default for System {
    fn default() -> System {
        System { root: PathBuf::from("/") }
    }
}

impl System {
    #[cfg(test)]
    pub(crate) fn below(root: &Path) -> System {
        System { root: root.to_owned() }
    }

    /// The folders of a class in /sys/class whose names have this prefix.
    fn devices(&self, class: &str, prefix: &str) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.root.join("sys/class").join(class)) else {
            return Vec::new();
        };
        let is_one =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
        entries.flatten().map(|entry| entry.path()).filter(is_one).collect()
    }
}

impl Readings for System {
    fn temperature(&mut self) -> Option<f64> {
        let zones = self.devices("thermal", "thermal_zone");
        let thousandths = zones.iter().filter_map(|zone| line(&zone.join("temp"))?.parse::<i64>().ok());
        thousandths.max().map(|t| t as f64 / 1000.0)
    }

    fn powered(&mut self) -> Option<bool> {
        let (mut on_mains, mut on_battery) = (false, None);
        for supply in self.devices("power_supply", "") {
            let says = |name: &str| line(&supply.join(name)).unwrap_or_default();
            // A mouse's battery isn't the machine's.
            if says("scope") == "Device" {
                continue;
            }
            if says("type") == "Battery" {
                let discharges = says("status") == "Discharging";
                on_battery = Some(on_battery.unwrap_or(false) || discharges);
            } else {
                // 1: online at a fixed voltage; 2: at a programmable one.
                on_mains |= matches!(says("online").as_str(), "1" | "2");
            }
        }
        if on_mains { Some(true) } else { on_battery.map(|discharges| !discharges) }
    }

    fn processor(&mut self) -> Option<Processor> {
        let total = line(&self.root.join("proc/stat"))?;
        let ticks: Vec<u64> =
            total.strip_prefix("cpu ")?.split_whitespace().map_while(|t| t.parse().ok()).collect();
        // user, nice, system, idle, iowait, irq, softirq, steal; user includes the guests' time.
        let [user, nice, system, idle, iowait, irq, softirq, steal] = *ticks.first_chunk::<8>()?;
        let busy = user + nice + system + irq + softirq;
        let own = line(&self.root.join("proc/self/stat"))?;
        // The program's name, in brackets, may contain blanks. utime and stime are the 12th and 13th field after it.
        let own: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
        let own = own.get(11)?.parse::<u64>().ok()? + own.get(12)?.parse::<u64>().ok()?;
        Some(Processor { all: busy + idle + iowait + steal, busy, own })
    }
}

/// A file's first line.
fn line(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().next().map(|line| line.trim().to_string())
}
