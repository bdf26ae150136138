//! The one owner of the table: takes what the observer saw, judges it, tells people, and publishes what
//! readers may look at.

use std::sync::Arc;

use tokio::sync::{mpsc::Receiver, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    ask::{Asker, Request},
    detail::Details,
    detect::{Change, Detector, Finding, HostLimits, Settings},
    observe::{Input, Observation},
    origins::Origins,
    stacks::Named,
    subscribe::Subscribers,
    table::Table,
    view::HostView,
};

/// Tells people of a leak.
pub(crate) type Report = Box<dyn Fn(&Finding) + Send>;

/// The table, the detector and the way to everybody else.
pub(crate) struct Host {
    table: Table,
    origins: Origins,
    details: Details,
    subscribers: Subscribers,
    detector: Detector,
    passes: u64,
    /// When the last pass ended.
    time: u64,
    requests: Asker,
    views: watch::Sender<Arc<HostView>>,
    report: Report,
}

impl Host {
    /// `report` is called once for each leak, with its examples.
    #[must_use]
    pub(crate) fn new(
        (limits, settings): (HostLimits, Settings),
        requests: Asker,
        views: watch::Sender<Arc<HostView>>,
        subscribers: Subscribers,
        report: Report,
    ) -> Self {
        Self {
            table: Table::default(),
            origins: Origins::default(),
            details: Details::default(),
            subscribers,
            detector: Detector::new(limits, settings),
            passes: 0,
            time: 0,
            requests,
            views,
            report,
        }
    }

    /// Runs until it is stopped or nobody is left to tell it anything.
    pub(crate) async fn run(mut self, inputs: &mut Receiver<Input>, stop: CancellationToken) {
        while let Some(Some(input)) = stop.run_until_cancelled(inputs.recv()).await {
            self.take(input);
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Events(events) => {
                for event in events.iter() {
                    self.table.apply(event);
                    self.origins.apply(event);
                }
                self.subscribers.publish(&events, 0);
            }
            Input::Named(stacks) => {
                for Named { process, made, stack } in &stacks {
                    self.origins.name(*process, made, stack);
                }
            }
            Input::Threads(key, threads) => self.details.threads(key, *threads),
            Input::Census(key, old) => {
                let view = Arc::clone(&self.views.borrow());
                if let Some(row) = view.rows.iter().find(|row| row.key == key) {
                    self.detector.census(row, &old, self.time);
                }
            }
            Input::Pass(observation) => self.pass(&observation),
            Input::Confirmed(key, resource, found) => {
                self.detector.confirm(key, resource, *found, self.time);
                self.tell();
            }
        }
    }

    /// Tells people what they are to be told now.
    fn tell(&mut self) {
        for mut finding in self.detector.tell(self.time) {
            self.details.fill(&mut finding);
            (self.report)(&finding);
        }
    }

    fn pass(&mut self, observation: &Observation) {
        self.table.reconcile(&observation.pass);
        for (process, listing) in &observation.pass.listings {
            self.origins.merge(*process, listing);
        }
        observation.pass.after.iter().for_each(|event| self.origins.apply(event));
        let rows = self.table.rows();
        self.time = observation.pass.ended;
        for change in self.detector.observe(&rows, observation.pass.ended) {
            let request = match change {
                Change::Suspect(key, resource) => {
                    self.origins.watch(key, resource);
                    Request::Remember(key, resource)
                }
                Change::Grown(key, resource, baseline) => Request::Confirm(key, resource, baseline),
                Change::Quiet(key, resource) => {
                    self.origins.unwatch(key, resource);
                    Request::Forget(key, resource)
                }
            };
            self.requests.ask(request);
        }
        for (key, old) in self.detector.wants_census(&rows, self.time) {
            self.requests.ask(Request::Census(key, old));
        }
        self.tell();
        self.passes += 1;
        let lost_before = self.views.borrow().lost();
        let mut findings = self.detector.findings();
        for (key, threads) in self.details.update(&findings, &self.origins, self.time) {
            self.requests.ask(Request::Threads(key, threads));
        }
        findings.iter_mut().for_each(|finding| self.details.fill(finding));
        let mut view = HostView {
            passes: self.passes,
            time: observation.pass.ended,
            pass_nanos: observation.pass.ended - observation.pass.began,
            rows,
            findings,
            drift: self.table.drift(),
            counts: observation.counts,
            ledger: observation.ledger,
            stack_ledger: observation.stack_ledger,
            stack_losses: observation.stack_losses,
            not_run: observation.not_run,
            failed: observation.failed,
            following: observation.following,
            untracked: observation.pass.untracked,
            fd_drift: self.origins.drift(),
            origins: self.origins.held(),
            subscribers: (self.subscribers.count(), self.subscribers.missed()),
            lost_lately: 0,
            programs: Arc::clone(&observation.programs),
        };
        view.lost_lately = view.lost().saturating_sub(lost_before);
        self.subscribers.publish(&observation.pass.after, view.lost_lately);
        self.views.send_replace(Arc::new(view));
    }
}
