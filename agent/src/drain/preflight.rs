//! What is said of a process before it gets a signal, and whether it gets one.

use super::{
    facts::{Facts, Supervisor, Tcp},
    service::Stop,
};

/// What pre-flight comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Judgement {
    /// Why the signal would do nothing, or harm.
    pub refused: Option<String>,
    pub notes: Vec<String>,
    /// The signal ends the process by itself.
    pub is_unhandled: bool,
}

/// Judges a process, with the sockets that are told of with it, of which its service says how it is to be stopped; or systemd
/// does, through its unit.
#[must_use]
pub(crate) fn judge(facts: &Facts, tcp: &Tcp, stop: &Stop, unit: Option<&str>) -> Judgement {
    let signal = stop.signal.name();
    let mut judgement = Judgement::default();
    let mut note = |text: String| judgement.notes.push(text);
    let is_handled = facts.is_handled();
    let refused = match &facts.supervisor {
        Supervisor::Pod => {
            Some("a pod is stopped by deleting it, else the kubelet starts it again".to_owned())
        }
        // It has other means.
        _ if unit.is_some() => None,
        _ if facts.ignored => Some(format!("it ignores {signal}")),
        _ if facts.is_init && !is_handled => Some(format!(
            "it is the first process of its pid namespace without a handler: {signal} does not reach it"
        )),
        _ => None,
    };
    match &facts.supervisor {
        Supervisor::Unit(own) if unit == Some(own) => {
            if facts.ignored {
                note(format!("it ignores {signal}, by which systemd stops {own}"));
            }
        }
        Supervisor::Unit(unit) => note(format!("systemd supervises it ({unit}): it may be started again")),
        Supervisor::UserUnit(unit) => {
            note(format!("a user's systemd supervises it ({unit}): it may be started again"));
        }
        Supervisor::Container => note("it runs in a container, which may be started again".to_owned()),
        Supervisor::Parent(name, pid) => {
            note(format!("{name} ({pid}) supervises it: it will be started again"));
        }
        Supervisor::Nobody | Supervisor::Pod => {}
    }
    if facts.blocked && !facts.has_signalfd {
        note(format!("all its threads block {signal}: it is taken only if one of them waits for it"));
    } else if !is_handled && !facts.ignored && refused.is_none() {
        note(format!("nothing handles {signal}: it ends at once and finishes nothing"));
    }
    if tcp.listeners.len() > MAX_LISTENERS {
        note(format!("listens on {} addresses", tcp.listeners.len()));
    } else if !tcp.listeners.is_empty() {
        let addresses: Vec<&str> = tcp.listeners.iter().map(|one| one.address.as_str()).collect();
        note(format!("listens on {}", addresses.join(", ")));
    }
    match tcp.connections {
        0 => {}
        1 => note("1 connection".to_owned()),
        many => note(format!("{many} connections")),
    }
    match tcp.busy {
        0 => {}
        1 => note("1 of them has data under way: a request may be in flight".to_owned()),
        many => note(format!("{many} of them have data under way: requests may be in flight")),
    }
    Judgement { refused, is_unhandled: !is_handled && !facts.blocked && !facts.ignored, ..judgement }
}

/// Addresses that are named.
const MAX_LISTENERS: usize = 4;

#[cfg(test)]
mod tests {
    use super::{super::facts::Listener, *};

    fn judged(facts: &Facts) -> Judgement {
        judge(facts, &Tcp::default(), &Stop::of(None, Some("nginx")).unwrap(), None)
    }

    #[test]
    fn a_signal_that_would_do_nothing_is_not_sent() {
        let refused = |facts| judged(&facts).refused.unwrap_or_default();
        assert!(refused(Facts { ignored: true, ..Facts::default() }).contains("ignores QUIT"));
        assert!(refused(Facts { is_init: true, ..Facts::default() }).contains("does not reach"));
        assert_eq!(refused(Facts { is_init: true, caught: true, ..Facts::default() }), "");
        assert!(
            refused(Facts { supervisor: Supervisor::Pod, caught: true, ..Facts::default() }).contains("pod")
        );
        assert_eq!(refused(Facts { caught: true, ..Facts::default() }), "");
    }

    #[test]
    fn what_may_surprise_is_said() {
        let said = |facts| judged(&facts).notes.join("; ");
        assert!(said(Facts::default()).contains("nothing handles QUIT"));
        assert!(judged(&Facts::default()).is_unhandled);
        assert_eq!(said(Facts { caught: true, ..Facts::default() }), "");
        let signalfd = Facts { blocked: true, has_signalfd: true, ..Facts::default() };
        assert_eq!((said(signalfd.clone()), judged(&signalfd).is_unhandled), (String::new(), false));
        let awaited = Facts { is_awaited: true, ..Facts::default() };
        assert_eq!((said(awaited.clone()), judged(&awaited).is_unhandled), (String::new(), false));
        assert!(said(Facts { blocked: true, ..Facts::default() }).contains("waits for it"));
        let parent = Supervisor::Parent("runsv".to_owned(), 7);
        assert!(said(Facts { supervisor: parent, caught: true, ..Facts::default() }).contains("runsv (7)"));
        let listener = Listener { address: "[::]:80".to_owned(), waiting: 0 };
        let tcp = Tcp { connections: 3, listeners: vec![listener], busy: 0 };
        let caught = Facts { caught: true, ..Facts::default() };
        let judgement = judge(&caught, &tcp, &Stop::of(None, Some("nginx")).unwrap(), None);
        assert_eq!(judgement.notes.join("; "), "listens on [::]:80; 3 connections");
    }
}
