//! How the driver takes up a drain that an agent before has left.

use std::{collections::HashMap, sync::Arc};

use super::{
    super::{
        active::{Active, by_place, same},
        course::{Fact, Input},
        journal::Journal,
        machine::Machine,
        report::State,
        service::Target,
        sockets::{Known, Sockets},
    },
    Driver,
};

impl Driver {
    /// Takes up what another agent has left, or tells that nobody does.
    pub(super) fn resume(&mut self) {
        self.take_up();
        let left = self.views.borrow().drain.clone().filter(|drain| drain.state != State::Finished);
        if let Some(left) = left.filter(|_| self.active.is_none()) {
            self.report(Arc::unwrap_or_clone(left).interrupted());
        }
    }

    fn take_up(&mut self) {
        let (journal, entries) = match Journal::open(&self.settings.run_dir) {
            Ok(Some(found)) => found,
            Ok(None) => return,
            Err(error) => {
                let aside = Journal::set_aside(&self.settings.run_dir);
                tracing::error!(
                    "the journal of a drain cannot be read: {error}; that drain is given up, and the journal is now {}",
                    aside.display()
                );
                return;
            }
        };
        let machine =
            Machine::replay(entries).filter(|machine| machine.begun.boot_id == self.settings.boot_id);
        let Some(machine) = machine else {
            tracing::warn!(
                "the journal of a drain is removed: it is of another boot, or not what plumb writes"
            );
            let _ = journal.remove();
            return;
        };
        if machine.finished.is_some() {
            // That agent has not come to keep the report.
            self.close(Active::new(machine, Ok(journal), HashMap::new(), None));
            return;
        }
        tracing::warn!(drain = machine.begun.id, "takes up a drain that an agent before has left");
        // Nobody held these meanwhile: they are found by their numbers, once.
        let registered = by_place(&machine.begun.services, |service| match &service.target {
            Target::Process(meant) => same(meant),
            _ => None,
        });
        let sockets = Sockets::begin(&self.ask, machine.runs.len(), Known::new());
        let unseen = machine.unseen();
        self.active = Some(Active::new(machine, Ok(journal), registered, Some(sockets)));
        for service in unseen {
            let why = "the agent was away for a part of it".to_owned();
            self.step(Input::Seen(service, Fact::Unseen { why, strays: false }));
        }
        self.active.iter_mut().for_each(Active::hold_again);
        self.step(Input::Resume);
    }
}
