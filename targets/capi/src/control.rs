//! How hot the device is, as reported by its system. [`Control`] has the rest of what steers a running call.

use engraft_runtime::run::{Control, Heat};

use crate::error::{Failure, Result};

/// The device is cool: work at full speed. As `ProcessInfo.ThermalState.nominal`.
pub const ENGRAFT_THERMAL_NOMINAL: i32 = 0;
/// It is warm: rest a tenth of the time.
pub const ENGRAFT_THERMAL_FAIR: i32 = 1;
/// It is hot: rest half of the time.
pub const ENGRAFT_THERMAL_SERIOUS: i32 = 2;
/// It is too hot: wait until this changes.
pub const ENGRAFT_THERMAL_CRITICAL: i32 = 3;

/// # Errors
/// `MISUSE` for a state that doesn't exist.
pub(crate) fn set_thermal(control: &Control, thermal: i32) -> Result<()> {
    let heat = match thermal {
        ENGRAFT_THERMAL_NOMINAL => Heat::Nominal,
        ENGRAFT_THERMAL_FAIR => Heat::Fair,
        ENGRAFT_THERMAL_SERIOUS => Heat::Serious,
        ENGRAFT_THERMAL_CRITICAL => Heat::Critical,
        other => return Err(Failure::misuse(format!("{other} isn't a thermal state"))),
    };
    control.set_heat(heat);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_that_do_not_exist_are_refused() {
        let control = Control::default();
        for thermal in ENGRAFT_THERMAL_NOMINAL..=ENGRAFT_THERMAL_CRITICAL {
            assert_eq!(set_thermal(&control, thermal), Ok(()));
        }
        assert!(set_thermal(&control, 4).is_err() && set_thermal(&control, -1).is_err());
    }
}
