//! What clients say of a drain, request by request, against what plumb says.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use serde_json::Value;

use super::{
    Host, alone,
    tiers::{Folder, Server},
};

/// What became of a request, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Answered,
    /// With something else than 200: for the kernel that is an answer.
    Failed,
    /// Nobody listened.
    Refused,
    /// On a connection that had been used: closed before the first byte of the answer.
    Kept,
    /// On a new connection: reset before the first byte.
    Reset,
    /// On a new connection closed without a reset, or amid an answer.
    Lost,
}

/// What one client or all of them saw.
#[derive(Debug, Default)]
struct Ledger {
    fates: BTreeMap<Fate, u64>,
    /// Ports of the clients whose requests were not answered.
    ports: BTreeSet<u16>,
}

impl Ledger {
    fn note(&mut self, fate: Fate, port: u16) {
        *self.fates.entry(fate).or_default() += 1;
        if matches!(fate, Fate::Kept | Fate::Reset | Fate::Lost) {
            self.ports.insert(port);
        }
    }

    fn add(&mut self, other: Self) {
        for (fate, many) in other.fates {
            *self.fates.entry(fate).or_default() += many;
        }
        self.ports.extend(other.ports);
    }

    fn of(&self, fate: Fate) -> u64 {
        self.fates.get(&fate).copied().unwrap_or(0)
    }
}

const CLIENTS: usize = 16;
/// The port of a client whose connection was reset before it was there.
const UNKNOWN: u16 = 0;
/// Between two attempts where nobody listens.
const PAUSE: Duration = Duration::from_millis(10);

/// Asks for as long as it may, one request after the other, on connections that it keeps.
fn client(port: u16, stop: &AtomicBool) -> Ledger {
    let mut ledger = Ledger::default();
    while !stop.load(Relaxed) {
        let mut stream = match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => stream,
            Err(error) => {
                let fate =
                    if error.kind() == ErrorKind::ConnectionRefused { Fate::Refused } else { Fate::Reset };
                ledger.note(fate, UNKNOWN);
                thread::sleep(PAUSE);
                continue;
            }
        };
        let own = stream.local_addr().unwrap().port();
        let mut is_used = false;
        // Whoever finds his connection closed before he asks takes another one.
        while !stop.load(Relaxed) {
            if is_used && is_closed(&stream) {
                break;
            }
            let (fate, stays) = ask(&mut stream, is_used);
            ledger.note(fate, own);
            if !matches!(fate, Fate::Answered | Fate::Failed) || !stays {
                break;
            }
            is_used = true;
        }
    }
    ledger
}

fn is_closed(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    !matches!(peeked, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

/// One request: what became of it, and whether the connection may be used again.
fn ask(stream: &mut TcpStream, is_used: bool) -> (Fate, bool) {
    let nothing = |is_reset: bool| match (is_used, is_reset) {
        (true, _) => Fate::Kept,
        (false, true) => Fate::Reset,
        (false, false) => Fate::Lost,
    };
    if stream.write_all(b"GET / HTTP/1.1\r\nHost: tiers\r\n\r\n").is_err() {
        return (nothing(true), false);
    }
    let mut answer = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(many @ 1..) => answer.extend(&bytes[..many]),
            Ok(0) if answer.is_empty() => return (nothing(false), false),
            Err(_) if answer.is_empty() => return (nothing(true), false),
            _ => return (Fate::Lost, false),
        }
        let text = String::from_utf8_lossy(&answer).to_ascii_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
        if body.len() >= length.trim().parse().unwrap() {
            let fate = if head.starts_with("http/1.1 200") { Fate::Answered } else { Fate::Failed };
            return (fate, !head.contains("connection: close"));
        }
    }
}

/// Load on a port from before a drain of all until shortly after the last of `servers` is gone: the ledger and the report.
fn drained(host: &Host, mut servers: Vec<Server>) -> (Ledger, Value) {
    let port = servers.last().unwrap().port;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| client(port, &stop))).collect();
        thread::sleep(Duration::from_millis(700));
        let report = scope.spawn(|| host.json(&["drain", "--all", "--deadline", "40s"]));
        let front = servers.last_mut().unwrap();
        while front.is_there() && !report.is_finished() {
            thread::sleep(Duration::from_millis(5));
        }
        // Whoever comes now is refused. After some more seconds nobody counts any more.
        thread::sleep(Duration::from_millis(300));
        stop.store(true, Relaxed);
        let mut ledger = Ledger::default();
        clients.into_iter().for_each(|client| ledger.add(client.join().unwrap()));
        (ledger, report.join().unwrap())
    })
}

/// What plumb says of a service equals the ledger of its clients, class by class and client by client.
fn compare(ledger: &Ledger, service: &Value) {
    let lost = |class: &str| service["lost_requests"][class].as_u64().unwrap_or(0);
    let told = || format!("{ledger:?}\n{service:#}");
    assert_eq!(service["unseen"], Value::Array(Vec::new()), "{}", told());
    assert_eq!(service["counted"]["refused"].as_u64().unwrap(), ledger.of(Fate::Refused), "{}", told());
    let examples = service["lost"].as_array().unwrap();
    let on_used: u64 = lost("keep_alive_race");
    let unanswered = lost("unanswered");
    assert_eq!(
        on_used + unanswered + lost("accept_queue") + lost("unread"),
        ledger.of(Fate::Kept) + ledger.of(Fate::Reset) + ledger.of(Fate::Lost),
        "{}",
        told()
    );
    // The kernel knows which were read; a client only that his connection had been used.
    assert!((on_used..=on_used + unanswered).contains(&ledger.of(Fate::Kept)), "{}", told());
    let resets = lost("accept_queue") + lost("unread");
    assert!(
        (resets..=resets + unanswered).contains(&(ledger.of(Fate::Reset) + ledger.of(Fate::Lost))),
        "{}",
        told()
    );
    if examples.len() < 64 {
        let peer = |one: &Value| one["peer"].as_str().unwrap().rsplit(':').next().unwrap().parse().unwrap();
        let ports: BTreeSet<u16> = examples.iter().map(peer).collect();
        let known = ledger.ports.iter().filter(|port| **port != UNKNOWN).copied().collect();
        assert!(ports.is_superset(&known), "{}", told());
        let unknown = if ledger.ports.contains(&UNKNOWN) { ledger.of(Fate::Reset) } else { 0 };
        assert!(ports.len() - known.len() <= usize::try_from(unknown).unwrap(), "{}", told());
    }
}

fn rounds() -> usize {
    std::env::var("PLUMB_DRAIN_ROUNDS").map_or(1, |rounds| rounds.parse().unwrap())
}

fn service<'a>(report: &'a Value, name: &str) -> &'a Value {
    let services = report["services"].as_array().unwrap();
    services.iter().find(|service| service["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"))
}

fn register(host: &Host, server: &Server, stop: &[&str]) {
    let pid = server.pid().to_string();
    let add = [&["services", "add", server.name, "--pid", &pid], stop].concat();
    let output = host.plumb(&add);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn three_tiers_that_stop_by_their_own_signals_lose_nothing_that_was_accepted_and_the_report_says_what_their_clients_say()
 {
    let _alone = alone();
    let (host, folder) = (Host::new(""), Folder::new());
    for round in 0..rounds() {
        let servers = folder.tiers();
        servers.iter().for_each(|server| register(&host, server, &["--preset", server.name]));
        let (ledger, report) = drained(&host, servers);
        println!("round {round}: {:?}; {}", ledger.fates, report["services"][0]["why"]);
        let front = service(&report, "haproxy");
        compare(&ledger, front);
        assert_eq!((ledger.of(Fate::Lost), ledger.of(Fate::Failed)), (0, 0), "{ledger:?}\n{front:#}");
        assert_eq!(front["lost_requests"]["unanswered"], Value::Null, "{front:#}");
        for name in ["haproxy", "nginx", "gunicorn", "redis", "postgresql"] {
            let service = service(&report, name);
            let is_lossless = service["lost_requests"].as_object().unwrap().is_empty();
            let verdict = if is_lossless { "clean" } else { "lossy" };
            assert_eq!(service["verdict"], verdict, "{service:#}");
        }
    }
}

#[test]
fn nginx_that_quits_before_clients_that_keep_their_connections_loses_what_they_say() {
    let _alone = alone();
    let (host, folder) = (Host::new(""), Folder::new());
    for round in 0..rounds() {
        let server = folder.nginx(None);
        register(&host, &server, &["--preset", "nginx"]);
        let (ledger, report) = drained(&host, vec![server]);
        println!("round {round}: {:?}; {}", ledger.fates, report["services"][0]["why"]);
        let nginx = service(&report, "nginx");
        compare(&ledger, nginx);
        let is_lossless = nginx["lost_requests"].as_object().unwrap().is_empty();
        assert_eq!(nginx["verdict"], if is_lossless { "clean" } else { "lossy" }, "{nginx:#}");
    }
}

#[test]
fn nginx_that_gets_the_wrong_signal_is_lossy_with_what_its_clients_lost() {
    let _alone = alone();
    let (host, folder) = (Host::new(""), Folder::new());
    for round in 0..rounds() {
        let servers = folder.tiers();
        let nginx = servers.iter().find(|server| server.name == "nginx").unwrap();
        register(&host, nginx, &["--signal", "TERM"]);
        let mut servers = servers;
        // Its clients ask it themselves.
        let at = servers.iter().position(|server| server.name == "nginx").unwrap();
        let nginx = servers.remove(at);
        let (ledger, report) = drained(&host, vec![nginx]);
        println!("round {round}: {:?}; {}", ledger.fates, report["services"][0]["why"]);
        let nginx = service(&report, "nginx");
        compare(&ledger, nginx);
        assert_eq!(nginx["verdict"], "lossy", "{nginx:#}");
        assert!(nginx["lost_requests"]["unanswered"].as_u64().unwrap() > 0, "{nginx:#}");
    }
}
