//! The one owner of the table: takes what the observer saw, judges it, tells people, and publishes what
//! readers may look at.

use std::sync::Arc;

use plumb_common::task::ProcKey;
use tokio::sync::{mpsc::Receiver, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    ask::{Asker, Request},
    detail::Details,
    detect::{Change, Detector, Finding, News, Resource, Saved},
    observe::{Input, Observation},
    origins::Origins,
    say::{Said, Saying},
    stacks::Named,
    subscribe::Subscribers,
    table::Table,
    view::HostView,
    watchlist::Watchlist,
};

/// Tells people what is new.
pub(crate) type Report = Box<dyn Fn(&News) + Send>;

/// Keeps findings for the next agent.
pub(crate) type Keep = Box<dyn Fn(Vec<Saved>) + Send>;

/// The table, the detector and the way to everybody else.
pub(crate) struct Host {
    table: Table,
    origins: Origins,
    watchlist: Watchlist,
    details: Details,
    subscribers: Subscribers,
    detector: Detector,
    passes: u64,
    /// When the last pass ended.
    time: u64,
    requests: Asker,
    views: watch::Sender<Arc<HostView>>,
    report: Report,
    keep: Keep,
    /// What was kept last, and when.
    kept: (Vec<Saved>, u64),
}

/// Between two times that findings are kept, in nanoseconds.
const KEEP_EVERY: u64 = 30_000_000_000;

impl Host {
    /// `report` is called once for whatever people are to be told.
    #[must_use]
    pub(crate) fn new(
        detector: Detector,
        requests: Asker,
        views: watch::Sender<Arc<HostView>>,
        subscribers: Subscribers,
        report: Report,
        keep: Keep,
    ) -> Self {
        Self {
            table: Table::default(),
            origins: Origins::default(),
            watchlist: Watchlist::default(),
            details: Details::default(),
            subscribers,
            detector,
            passes: 0,
            time: 0,
            requests,
            views,
            report,
            keep,
            kept: (Vec::new(), 0),
        }
    }

    /// Runs until it is stopped or nobody is left to tell it anything.
    pub(crate) async fn run(mut self, inputs: &mut Receiver<Input>, stop: CancellationToken) {
        while let Some(Some(input)) = stop.run_until_cancelled(inputs.recv()).await {
            self.take(input);
        }
        // Before the first pass there is nothing to keep but what is there.
        if self.passes > 0 {
            (self.keep)(self.saved());
        }
    }

    fn saved(&self) -> Vec<Saved> {
        self.detector.save(|key, resource| self.details.origin(key, resource))
    }

    /// Keeps what has changed, every now and then.
    fn keep(&mut self) {
        if self.time.saturating_sub(self.kept.1) >= KEEP_EVERY {
            self.kept.1 = self.time;
            let saved = self.saved();
            if saved != self.kept.0 {
                self.kept.0.clone_from(&saved);
                (self.keep)(saved);
            }
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
            Input::Say(Saying { id, what, answer }) => {
                let done = match what {
                    Said::Ack(reason) => self.detector.ack(&id, reason, self.time),
                    Said::Silence(until) => self.detector.silence(&id, until),
                    Said::Unsilence => self.detector.unsilence(&id, self.time),
                };
                if done.is_ok() {
                    self.tell();
                    self.show_findings();
                }
                // Whoever asked may have gone.
                let _ = answer.send(done);
            }
            Input::Census(key, old) => {
                let view = Arc::clone(&self.views.borrow());
                if let Some(row) = view.rows.iter().find(|row| row.key == key) {
                    self.detector.census(row, &old, self.time);
                }
            }
            Input::Pass(observation) => self.pass(&observation),
            Input::Confirmed(key, resource, mut found) => {
                found.functions = self.origins.by_origin(key, resource, self.time).functions();
                self.detector.confirm(key, resource, *found, self.time);
                self.tell();
            }
        }
    }

    /// Tells people what they are to be told now.
    fn tell(&mut self) {
        for mut news in self.detector.tell(self.time) {
            self.details.fill(&mut news.finding);
            (self.report)(&news);
        }
    }

    fn watch(&mut self, key: ProcKey, resource: Resource) {
        self.origins.watch(key, resource);
        self.requests.ask(Request::Watch(key, resource));
    }

    fn unwatch(&mut self, key: ProcKey, resource: Resource) {
        self.origins.unwatch(key, resource);
        self.requests.ask(Request::Unwatch(key, resource));
        for (key, resource) in self.watchlist.remove((key, resource)) {
            self.watch(key, resource);
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let mut findings = self.detector.findings();
        findings.iter_mut().for_each(|finding| self.details.fill(finding));
        findings
    }

    /// Publishes the findings without waiting for the next pass.
    fn show_findings(&self) {
        let findings = self.findings();
        self.views.send_modify(|view| *view = Arc::new(HostView { findings, ..(**view).clone() }));
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
                    let row = rows.iter().find(|row| row.key == key);
                    if row.is_some_and(|row| self.watchlist.add((key, resource), &row.info.group)) {
                        self.watch(key, resource);
                    }
                    Request::Remember(key, resource)
                }
                Change::Grown(key, resource, baseline) => Request::Confirm(key, resource, baseline),
                Change::Quiet(key, resource) => {
                    self.unwatch(key, resource);
                    Request::Forget(key, resource)
                }
            };
            self.requests.ask(request);
        }
        for (key, old) in self.detector.wants_census(&rows, self.time) {
            self.requests.ask(Request::Census(key, old));
        }
        self.tell();
        self.keep();
        self.passes += 1;
        let lost_before = self.views.borrow().lost();
        let findings = self.detector.findings();
        for (key, threads) in self.details.update(&findings, &self.origins, self.time) {
            self.requests.ask(Request::Threads(key, threads));
        }
        let findings = self.findings();
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
            watch_waiting: self.watchlist.waiting(),
            subscribers: (self.subscribers.count(), self.subscribers.missed()),
            lost_lately: 0,
            programs: Arc::clone(&observation.programs),
        };
        view.lost_lately = view.lost().saturating_sub(lost_before);
        self.subscribers.publish(&observation.pass.after, view.lost_lately);
        self.views.send_replace(Arc::new(view));
    }
}
