//! Connections that were there before they are followed: whether they were answered is told by what the kernel keeps.

use std::{
    io::Write,
    net::{TcpListener, TcpStream},
    thread::sleep,
    time::Duration,
};

use plumb::{kernel::Status, losses::Class};

use super::{Stage, Told, WAYS_IN, hands::*, listen, port_of};

/// Of each kind in each round.
const MANY: u64 = 6;
/// Since what was last sent: nothing, a tick of the kernel's clock or a few, and more than an acknowledgement is
/// held back for.
const PAUSES: [u64; 4] = [0, 6, 15, 70];

/// What has happened on a connection before it is followed, and what it loses when it is closed.
#[derive(Clone, Copy)]
struct Past {
    name: &'static str,
    play: fn(&TcpStream, &TcpStream),
    loses: Option<Class>,
    /// Told from the kernel's clocks.
    guessed: bool,
    /// Closed in order, or with a reset, since something is unread.
    closed: bool,
}

const fn past(name: &'static str, play: fn(&TcpStream, &TcpStream), loses: Option<Class>) -> Past {
    Past { name, play, loses, guessed: false, closed: true }
}

const fn guessed(past: Past) -> Past {
    Past { guessed: true, ..past }
}

const fn reset(past: Past) -> Past {
    Past { closed: false, ..past }
}

static PASTS: [Past; 9] = [
    past("nothing", |_, _| {}, None),
    past("answered", serve, None),
    past("answered a hundred times", |client, server| (0..100).for_each(|_| serve(client, server)), None),
    past(
        "answered late",
        |client, server| {
            send(client);
            read_request(server);
            sleep(Duration::from_millis(12));
            answer(server);
            read_answer(client);
        },
        None,
    ),
    past(
        "the first is read",
        |client, server| {
            send(client);
            read_request(server);
        },
        Some(Class::Unanswered),
    ),
    guessed(past(
        "answered, then read",
        |client, server| {
            serve(client, server);
            send(client);
            read_request(server);
        },
        Some(Class::Unanswered),
    )),
    guessed(past(
        "answered, and read some time later",
        |client, server| {
            serve(client, server);
            sleep(Duration::from_millis(12));
            send(client);
            read_request(server);
        },
        Some(Class::Unanswered),
    )),
    reset(past("not read", |client, _| ask(client), Some(Class::Unread))),
    reset(past(
        "answered, then not read",
        |client, server| {
            serve(client, server);
            ask(client);
        },
        Some(Class::KeepAliveRace),
    )),
];

fn pairs(listener: &TcpListener, from: std::net::IpAddr) -> Vec<(TcpStream, TcpStream)> {
    (0..MANY).map(|_| pair(listener, from)).collect()
}

#[test]
fn of_a_connection_that_was_there_before_it_is_told_what_it_loses() {
    let mut wrong = Vec::new();
    for pause in PAUSES {
        let mut stage = Stage::new();
        for past in &PASTS {
            for (at, from) in WAYS_IN {
                let Some(listener) = listen(at) else { continue };
                let pairs = pairs(&listener, from);
                for (client, server) in &pairs {
                    (past.play)(client, server);
                }
                sleep(Duration::from_millis(pause));
                let slot = stage.follow(port_of(&listener));
                for (client, server) in pairs {
                    drop(server);
                    if past.closed {
                        is_closed(&client);
                    } else {
                        is_reset(&client);
                    }
                }
                stage.catch_up();
                let mut expected = Told::default();
                if past.closed {
                    expected = Told::counting(&[("closed_by_service", MANY)]);
                }
                if let Some(class) = past.loses {
                    expected = expected.losing(class, MANY);
                }
                expected.guessed = if past.guessed { MANY } else { 0 };
                let told = stage.told(slot);
                // A later listener, of the other family, may get this port: its connections must not be followed from
                // their beginning.
                stage.unfollow(port_of(&listener));
                if told != expected {
                    wrong.push(format!("{pause} ms after {}, at {at} from {from}: {told:?}", past.name));
                }
            }
        }
        stage.is_complete();
    }
    assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn an_answer_that_its_client_has_not_acknowledged_is_one() {
    let mut stage = Stage::new();
    for (at, from) in WAYS_IN {
        let Some(listener) = listen(at) else { continue };
        let (client, mut server) = pair(&listener, from);
        serve(&client, &server);
        ask(&client);
        read_request(&server);
        // What is sent now does not arrive.
        hear_nothing(&client);
        server.write_all(ANSWER).unwrap();
        let slot = stage.follow(port_of(&listener));
        drop(server);
        stage.expect(slot, "answered", &Told::counting(&[("closed_by_service", 1)]));
    }
}

#[test]
fn a_client_that_probes_has_asked_for_nothing() {
    let mut stage = Stage::new();
    for (at, from) in WAYS_IN {
        let Some(listener) = listen(at) else { continue };
        let pairs = pairs(&listener, from);
        for (client, server) in &pairs {
            probe(client);
            serve(client, server);
        }
        sleep(Duration::from_millis(1500));
        let slot = stage.follow(port_of(&listener));
        let clients: Vec<TcpStream> = pairs.into_iter().map(|(client, _)| client).collect();
        clients.iter().for_each(is_closed);
        stage.expect(slot, "probed", &Told::counting(&[("closed_by_service", MANY)]));
    }
}

#[test]
fn what_was_known_is_forgotten_when_nobody_follows_any_more() {
    let mut stage = Stage::new();
    let (at, from) = WAYS_IN[0];
    let listener = listen(at).unwrap();
    let slot = stage.follow(port_of(&listener));
    let (client, server) = pair(&listener, from);
    serve(&client, &server);
    assert_eq!(stage.kernel.conversations().unwrap(), 1);
    stage.kernel.follow_sockets(false);
    assert_eq!(stage.kernel.conversations().unwrap(), 0);
    serve(&client, &server);
    stage.kernel.follow_sockets(true);
    assert!(stage.kernel.programs().iter().all(Status::is_fine), "{:?}", stage.kernel.programs());
    drop(server);
    is_closed(&client);
    stage.expect(slot, "answered", &Told::counting(&[("connected", 1), ("closed_by_service", 1)]));
    assert_eq!(stage.kernel.closed_conversations().unwrap(), 1);
    stage.kernel.follow_sockets(false);
    assert_eq!(stage.kernel.closed_conversations().unwrap(), 0);
}

#[test]
fn a_late_request_of_a_connection_that_was_closed_before_is_told_as_such() {
    let mut stage = Stage::new();
    for (at, from) in WAYS_IN {
        let Some(listener) = listen(at) else { continue };
        let (mut client, server) = pair(&listener, from);
        serve(&client, &server);
        drop(server);
        is_closed(&client);
        let slot = stage.follow(port_of(&listener));
        client.write_all(REQUEST).unwrap();
        is_broken(&client);
        let told = Told { guessed: 1, ..Told::default().losing(Class::KeepAliveRace, 1).late() };
        stage.expect(slot, "late", &told);
    }
}
