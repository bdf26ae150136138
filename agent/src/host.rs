//! The one owner of the table: takes what the observer saw, judges it, tells people, and publishes what
//! readers may look at.

use std::sync::Arc;

use tokio::sync::{mpsc::Receiver, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    ask::{Asker, Request},
    detect::{Change, Detector, Finding, HostLimits},
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
        limits: HostLimits,
        requests: Asker,
        views: watch::Sender<Arc<HostView>>,
        subscribers: Subscribers,
        report: Report,
    ) -> Self {
        Self {
            table: Table::default(),
            origins: Origins::default(),
            subscribers,
            detector: Detector::new(limits),
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
            Input::Pass(observation) => self.pass(&observation),
            Input::Named(stacks) => {
                for Named { process, made, stack } in &stacks {
                    self.origins.name(*process, made, stack);
                }
            }
            Input::Confirmed(key, resource, found) => {
                if let Some(finding) = self.detector.confirm(key, resource, *found, self.time) {
                    (self.report)(finding);
                }
            }
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
        self.passes += 1;
        let lost_before = self.views.borrow().lost();
        let mut findings = self.detector.findings();
        for finding in &mut findings {
            finding.origins = self.origins.by_origin(finding.key, finding.resource);
        }
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
