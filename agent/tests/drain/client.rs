//! One connection to the admin socket of an agent.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The agent closes a connection on which nothing is asked for a while: one that has rested longer is opened anew.
const REST: Duration = Duration::from_secs(1);

pub(crate) struct Client {
    socket: PathBuf,
    connection: BufReader<UnixStream>,
    used: Instant,
}

impl Client {
    pub(crate) fn connect(run_dir: &str) -> Self {
        let socket = Path::new(run_dir).join("plumb.sock");
        let connection = BufReader::new(UnixStream::connect(&socket).unwrap());
        Self { socket, connection, used: Instant::now() }
    }

    /// Status and document; that of an answer without one is `null`.
    pub(crate) fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        self.send(method, path, body);
        self.answer()
    }

    /// The answer is to be read next.
    pub(crate) fn send(&mut self, method: &str, path: &str, body: Option<&Value>) {
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: plumb\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        if self.used.elapsed() > REST {
            self.connection = BufReader::new(UnixStream::connect(&self.socket).unwrap());
        }
        self.connection.get_mut().write_all((head + &body).as_bytes()).unwrap();
    }

    pub(crate) fn answer(&mut self) -> (u16, Value) {
        let connection = &mut self.connection;
        let mut line = String::new();
        connection.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status: {line:?}"));
        let status = status.parse().unwrap();
        let mut length = 0;
        while line != "\r\n" {
            line.clear();
            assert!(connection.read_line(&mut line).unwrap() > 0, "the answer is cut");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut bytes = vec![0; length];
        connection.read_exact(&mut bytes).unwrap();
        self.used = Instant::now();
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// The drain under way or the last one, as soon as something holds for it.
    pub(crate) fn drain_when(&mut self, holds: impl Fn(&Value) -> bool) -> Value {
        let (mut progress, end) = (self.ask("GET", "/v1/drain", None).1, std::time::Instant::now());
        while !holds(&progress["drain"]) {
            assert!(end.elapsed().as_secs() < 120, "the drain does not come so far: {progress:#}");
            progress = self.ask("GET", &format!("/v1/drain?since={}", progress["generation"]), None).1;
        }
        progress["drain"].take()
    }
}
