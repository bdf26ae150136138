//! What people say about findings: that they know, or want to hear nothing until some time.

use super::{
    Detector,
    finding::{Acknowledged, Finding, Mark},
};

/// There is no finding with this id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoSuchFinding;

impl Detector {
    /// Somebody knows of it: it is told again only when it has grown to twice its size.
    pub(crate) fn ack(&mut self, id: &str, reason: Option<String>, now: u64) -> Result<(), NoSuchFinding> {
        self.mark(id, |finding, mark| {
            mark.acknowledged = Some(Acknowledged { at: now, reason, live: finding.live });
        })
    }

    /// It is not told before `until`, nanoseconds since boot; `None` ends a silence.
    pub(crate) fn silence(&mut self, id: &str, until: Option<u64>) -> Result<(), NoSuchFinding> {
        self.mark(id, |_, mark| mark.silenced_until = until)
    }

    fn mark(&mut self, id: &str, say: impl FnOnce(&Finding, &mut Mark)) -> Result<(), NoSuchFinding> {
        let finding = self.findings().into_iter().find(|finding| finding.id() == id).ok_or(NoSuchFinding)?;
        let at = (finding.key, finding.resource, finding.rule);
        say(&finding, self.marks.entry(at).or_default());
        Ok(())
    }
}
