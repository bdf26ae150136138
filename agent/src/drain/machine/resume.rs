//! How the machine goes on where another agent had come to.

use super::{
    super::course::{Action, Entry, Phase, Run, Sent},
    Machine,
};

impl Machine {
    /// Services of which something may have happened while no agent was there.
    pub(crate) fn unseen(&self) -> Vec<usize> {
        let is_under_way =
            |run: &Run| !run.members.is_empty() && !matches!(run.phase, Phase::Settled | Phase::Late);
        (0..self.runs.len()).filter(|service| is_under_way(&self.runs[*service])).collect()
    }

    /// Goes on where another agent had come to.
    pub(super) fn resume(&mut self, now: u64, out: &mut Vec<Action>) {
        self.record(out, Entry::Resumed { at: now });
        for service in 0..self.runs.len() {
            let run = &self.runs[service];
            let is_unasked = matches!(run.phase, Phase::Checking | Phase::Prestop | Phase::Stopping)
                && run.signalled.is_none();
            if is_unasked && self.is_too_late(now, service) {
                self.record(out, Entry::NoTime { at: now, service });
                continue;
            }
            match run.phase {
                Phase::Checking => out.push(Action::Find(service)),
                Phase::Prestop => out.push(Action::Prestop(service)),
                Phase::Stopping | Phase::Killing => {
                    let perhaps =
                        self.runs[service].members.iter_mut().filter(|one| one.sent == Sent::Perhaps);
                    if perhaps.count() > 0 {
                        let note = "the agent ended while it sent the signal: it may not have been sent, and is not \
                                    sent again";
                        self.runs[service].notes.push(note.to_owned());
                    }
                    out.push(Action::Watch(service));
                    let run = &self.runs[service];
                    if run.signalled.is_none() {
                        // It was found, and that agent has not come further.
                        self.ask_to_stop(now, service, out);
                    } else if let Some(unit) = run.found.unit.clone().filter(|_| !run.unit_stopped) {
                        // Asking twice stops it once; long afterwards somebody may have started it again.
                        let is_too_late = self.is_too_late(now, service);
                        let action = if is_too_late { Action::FindUnit } else { Action::StopUnit };
                        out.push(action(service, unit));
                    }
                    self.confirm(service, out);
                }
                _ => {}
            }
        }
    }
}
