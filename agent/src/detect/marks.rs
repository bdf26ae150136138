//! What people say about findings: that they know, or want to hear nothing until some time.

use super::{
    Detector,
    finding::{Acknowledged, Finding, Mark},
};

/// Why nothing came of what somebody said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// There is no finding with this id.
    NoSuchFinding,
    /// There is no silence to end.
    NotSilenced,
}

impl Detector {
    /// Somebody knows of it: it is told again only when it has grown to twice its size.
    pub(crate) fn ack(&mut self, id: &str, reason: Option<String>, now: u64) -> Result<(), Refused> {
        let finding = self.by_id(id)?;
        let mark = self.mark(&finding);
        // Said again without a reason, it has that of before.
        let reason = reason.or_else(|| mark.acknowledged.take()?.reason);
        mark.acknowledged = Some(Acknowledged { at: now, reason, live: finding.live });
        Ok(())
    }

    /// It is not told before `until`, nanoseconds since boot.
    pub(crate) fn silence(&mut self, id: &str, until: u64) -> Result<(), Refused> {
        let finding = self.by_id(id)?;
        self.mark(&finding).silenced_until = Some(until);
        Ok(())
    }

    /// Ends a silence.
    pub(crate) fn unsilence(&mut self, id: &str, now: u64) -> Result<(), Refused> {
        let finding = self.by_id(id)?;
        if finding.mark.silenced_until.is_none_or(|until| until <= now) {
            return Err(Refused::NotSilenced);
        }
        self.mark(&finding).silenced_until = None;
        Ok(())
    }

    fn by_id(&self, id: &str) -> Result<Finding, Refused> {
        self.all().into_iter().find(|finding| finding.id() == id).ok_or(Refused::NoSuchFinding)
    }

    fn mark(&mut self, finding: &Finding) -> &mut Mark {
        self.marks.entry((finding.key, finding.resource, finding.rule)).or_default()
    }
}
