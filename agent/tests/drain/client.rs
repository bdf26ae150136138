//! One connection to the admin socket of an agent.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use serde_json::Value;

pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    pub(crate) fn connect(run_dir: &str) -> Self {
        Self(BufReader::new(UnixStream::connect(Path::new(run_dir).join("plumb.sock")).unwrap()))
    }

    /// Status and document; that of an answer without one is `null`.
    pub(crate) fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: plumb\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.0.get_mut().write_all((head + &body).as_bytes()).unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("{method} {path}: {line:?}"));
        let status = status.parse().unwrap();
        let mut length = 0;
        while line != "\r\n" {
            line.clear();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "{method} {path}: cut");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
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
