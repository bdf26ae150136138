//! The one owner of the table: takes what the observer saw, judges it, tells people, and publishes what
//! readers may look at.

use std::sync::{Arc, mpsc};

use tokio::sync::{mpsc::Receiver, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    detect::{Change, Detector, Finding, HostLimits},
    observe::{Input, Observation, Request},
    table::Table,
    view::HostView,
};

/// Tells people of a leak.
pub(crate) type Report = Box<dyn Fn(&Finding) + Send>;

/// The table, the detector and the way to everybody else.
pub(crate) struct Host {
    table: Table,
    detector: Detector,
    passes: u64,
    requests: mpsc::Sender<Request>,
    views: watch::Sender<Arc<HostView>>,
    report: Report,
}

impl Host {
    /// `report` is called once for each leak, with its examples.
    #[must_use]
    pub(crate) fn new(
        limits: HostLimits,
        requests: mpsc::Sender<Request>,
        views: watch::Sender<Arc<HostView>>,
        report: Report,
    ) -> Self {
        Self { table: Table::default(), detector: Detector::new(limits), passes: 0, requests, views, report }
    }

    /// Runs until it is stopped or nobody is left to tell it anything.
    pub(crate) async fn run(mut self, inputs: &mut Receiver<Input>, stop: CancellationToken) {
        while let Some(Some(input)) = stop.run_until_cancelled(inputs.recv()).await {
            self.take(input);
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Events(events) => events.iter().for_each(|event| self.table.apply(event)),
            Input::Pass(observation) => self.pass(&observation),
            Input::Confirmed(key, resource, found) => {
                if let Some(finding) = self.detector.confirm(key, resource, found) {
                    (self.report)(finding);
                }
            }
        }
    }

    fn pass(&mut self, observation: &Observation) {
        self.table.reconcile(&observation.pass);
        let rows = self.table.rows();
        for change in self.detector.observe(&rows, observation.ended) {
            let request = match change {
                Change::Suspect(key, resource) => Request::Remember(key, resource),
                Change::Grown(key, resource, baseline) => Request::Confirm(key, resource, baseline),
                Change::Quiet(key, resource) => Request::Forget(key, resource),
            };
            // The receiver outlives the observer, so this fails only when the agent is ending.
            let _ = self.requests.send(request);
        }
        self.passes += 1;
        let lost_before = self.views.borrow().lost();
        let mut view = HostView {
            passes: self.passes,
            time: observation.ended,
            pass_nanos: observation.ended - observation.pass.began,
            rows,
            findings: self.detector.findings(),
            drift: self.table.drift(),
            counts: observation.counts,
            rejected: observation.rejected,
            lost_lately: 0,
            programs: Arc::clone(&observation.programs),
        };
        view.lost_lately = view.lost().saturating_sub(lost_before);
        self.views.send_replace(Arc::new(view));
    }
}
