//! Where the events of `plumb watch` go: each to a line, or all into sums.

use std::{collections::HashMap, sync::Arc, time::Duration};

use plumb_common::task::ProcKey;

use super::{
    super::output::{self, Format},
    Arguments,
};
use crate::{
    clock::Calendar,
    decode::{Event, Sample},
    detect::Resource,
    document::{Origin, WatchedOrigins},
    failure::Failure,
    kernel::Kernel,
    line::{Counted, EventCounts, Line},
    origins::Origins,
    stacks::{Matched, Named, Names, Stack},
};

pub(super) struct Printer {
    calendar: Calendar,
    format: Format,
    /// Instead of lines.
    sums: Option<Counted>,
    watching: Option<Watching>,
    /// The process that is watched.
    pid: Option<u32>,
}

/// Where what the process makes comes from.
#[derive(Default)]
struct Watching {
    names: Names,
    matched: Matched,
    origins: Origins,
    process: Option<ProcKey>,
}

impl Printer {
    pub(super) fn new(arguments: &Arguments) -> Self {
        Self {
            calendar: Calendar::now(),
            format: arguments.output.format,
            sums: arguments.count.then(Counted::default),
            watching: arguments.origins.then(Watching::default),
            pid: arguments.pid,
        }
    }

    pub(super) fn begin(&self) -> Result<bool, Failure> {
        if self.sums.is_some() || self.format != Format::Table {
            return Ok(true);
        }
        output::data(&format!("{:<24} {:>7} {:>7} {:<15} EVENT\n", "TIME", "PID", "TID", "COMM"))
    }

    /// Whether somebody still reads.
    pub(super) fn take(&mut self, events: &[Event], stacks: Vec<Sample>) -> Result<bool, Failure> {
        let stacks = self.watching.as_mut().map(|watching| watching.take(events, stacks)).unwrap_or_default();
        if let Some(counted) = &mut self.sums {
            events.iter().for_each(|event| counted.take(event));
            return Ok(true);
        }
        let mut page = String::new();
        for event in events {
            let header = event.header();
            let stack = stacks.get(&(header.tid, header.time)).filter(|_| event.is_made());
            let line = Line::new(event, self.calendar, stack.map(|stack| stack.functions()));
            page += &if self.format == Format::Table { line.text() } else { line.json() };
            page.push('\n');
        }
        output::data(&page)
    }

    pub(super) fn end(
        &self,
        kernel: &Kernel,
        rejected: u64,
        took: Duration,
        cpu: Duration,
    ) -> Result<(), Failure> {
        if let Some(counted) = &self.sums {
            let counts = kernel.counts()?;
            let elsewhere = [("decode", rejected), ("not_run", kernel.not_run())];
            self.print(&EventCounts::new(counted, (&counts, elsewhere), kernel.seam(), took, cpu))?;
        }
        if let (Some(Watching { origins, process, .. }), Some(pid)) = (&self.watching, self.pid) {
            let made = |resource| {
                // All stacks have been looked at. Without an event nothing was made.
                let groups = process.map(|process| origins.by_origin(process, resource, u64::MAX).groups);
                groups.iter().flatten().map(|group| Origin::new(group, self.calendar)).collect()
            };
            self.print(&WatchedOrigins::new(pid, made(Resource::Fd), made(Resource::Thread)))?;
        }
        Ok(())
    }

    fn print(&self, document: &impl Document) -> Result<(), Failure> {
        let text =
            if self.format == Format::Table { document.text() } else { output::json(document)? + "\n" };
        output::data(&text)?;
        Ok(())
    }
}

/// Something that comes at the end.
trait Document: serde::Serialize {
    /// For people.
    fn text(&self) -> String;
}

impl Document for EventCounts {
    fn text(&self) -> String {
        Self::text(self)
    }
}

impl Document for WatchedOrigins {
    fn text(&self) -> String {
        Self::text(self)
    }
}

impl Watching {
    /// Puts stacks to what the events made; returns them by thread and time.
    fn take(&mut self, events: &[Event], mut stacks: Vec<Sample>) -> HashMap<(u32, u64), Arc<Stack>> {
        let mut named = Vec::new();
        for event in events {
            let process = event.header().process;
            if self.process.is_none() {
                self.process = Some(process);
                Resource::ALL.into_iter().for_each(|resource| self.origins.watch(process, resource));
            }
            // What it has when it ends is what is left.
            if !matches!(event, Event::Exit(exit) if exit.group_dead != 0) {
                self.origins.apply(event);
            }
            if matches!(event, Event::Exec(_)) {
                // What came before belongs to the files of then.
                named.extend(self.names.of(taken_before(&mut stacks, event.header().time)));
                self.names.watch(process);
            }
        }
        named.extend(self.names.of(stacks));
        let mut found = HashMap::new();
        for Named { process, made, stack } in self.matched.of(events, named) {
            self.origins.name(process, &made, &stack);
            found.insert((made.by, made.time), stack);
        }
        found
    }
}

/// Takes those out that are older.
fn taken_before(stacks: &mut Vec<Sample>, time: u64) -> Vec<Sample> {
    stacks.extract_if(.., |sample| sample.head.header.time < time).collect()
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    #[test]
    fn stacks_of_before_an_exec_are_named_by_the_image_of_then() {
        let sample = |time| {
            let mut head = plumb_common::event::Stack::zeroed();
            head.header.time = time;
            Sample { head, bytes: Vec::new() }
        };
        let mut stacks = vec![sample(3), sample(8), sample(5), sample(6)];
        let times = |stacks: &[Sample]| stacks.iter().map(|one| one.head.header.time).collect::<Vec<_>>();
        assert_eq!(times(&taken_before(&mut stacks, 6)), [3, 5]);
        assert_eq!(times(&stacks), [8, 6]);
    }
}
