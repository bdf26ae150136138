//! What runs beside the command and is not followed: scripts that drive it, and whatever tells that it is ready.

use std::{
    io,
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    str::FromStr,
    sync::mpsc::{Receiver, TryRecvError, channel},
    thread,
    time::Duration,
};

use http_body_util::Empty;
use hyper::{
    Uri,
    body::Bytes,
    http::{Request, uri::PathAndQuery},
};
use hyper_util::rt::TokioIo;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::command::Before;

/// Time for one try.
const TRY: Duration = Duration::from_secs(1);

/// How it is known that a server is ready.
#[derive(Clone, Debug)]
pub(super) enum Ready {
    /// It listens there.
    Port(SocketAddr),
    /// It answers this with a status below 400.
    Url(Uri),
    /// This ends with 0.
    Script(String),
}

impl FromStr for Ready {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.parse::<u16>() {
            return Ok(Self::Port(SocketAddr::from(([127, 0, 0, 1], port))));
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
            return Err(format!("{text} is no port: 1 to 65535"));
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Port(address));
        }
        // A word with a number after a colon is no command, but the name of a host.
        if let Some((host, port)) = text.rsplit_once(':')
            && port.parse::<u16>().is_ok()
            && !host.contains([' ', '/', ':'])
        {
            let found =
                text.to_socket_addrs().map_err(|error| format!("{host} is no known host: {error}"))?;
            return found.into_iter().next().map(Self::Port).ok_or_else(|| format!("{host} has no address"));
        }
        if text.starts_with("https://") {
            return Err("https is not spoken; give the port, or a script such as 'curl -fsk URL'".to_owned());
        }
        if text.starts_with("http://") {
            return text.parse().map(Self::Url).map_err(|error| format!("{text} is no URL: {error}"));
        }
        if text.trim().is_empty() {
            return Err("give a port, an address such as 127.0.0.1:80, a URL or a script".to_owned());
        }
        Ok(Self::Script(text.to_owned()))
    }
}

/// A question whether a server is ready, on its way.
pub(super) enum Asking {
    /// For a second at most.
    Thread(Receiver<bool>),
    Script(Child),
}

impl Asking {
    /// `None` until it is known.
    pub(super) fn answer(&mut self) -> io::Result<Option<bool>> {
        match self {
            Self::Thread(answer) => match answer.try_recv() {
                Err(TryRecvError::Empty) => Ok(None),
                // It panicked.
                Err(TryRecvError::Disconnected) => Ok(Some(false)),
                Ok(answer) => Ok(Some(answer)),
            },
            Self::Script(script) => match script.try_wait()? {
                // As the shell has it: there is no such command, and there will be none.
                Some(status) if matches!(status.code(), Some(126 | 127)) => {
                    Err(io::Error::other(format!("the script of --ready cannot be run ({status})")))
                }
                status => Ok(status.map(|status| status.success())),
            },
        }
    }

    /// The answer is of no use any more.
    pub(super) fn end(self) -> io::Result<()> {
        match self {
            Self::Thread(_) => Ok(()),
            Self::Script(mut script) => end(&mut script),
        }
    }
}

impl Ready {
    /// Asks whether it is now.
    pub(super) fn ask(&self, before: &Before) -> io::Result<Asking> {
        match self {
            Self::Port(address) => {
                let address = *address;
                Ok(in_thread(move || TcpStream::connect_timeout(&address, TRY).is_ok()))
            }
            Self::Url(uri) => {
                let uri = uri.clone();
                Ok(in_thread(move || answers(&uri)))
            }
            Self::Script(script) => start(script, before).map(Asking::Script),
        }
    }

    pub(super) fn words(&self) -> String {
        match self {
            Self::Port(address) => format!("port {address}"),
            Self::Url(uri) => uri.to_string(),
            Self::Script(script) => format!("`{script}`"),
        }
    }
}

fn in_thread(ask: impl FnOnce() -> bool + Send + 'static) -> Asking {
    let (sender, answer) = channel();
    // Nobody may be left to be told.
    thread::spawn(move || _ = sender.send(ask()));
    Asking::Thread(answer)
}

fn answers(uri: &Uri) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = async {
        let host = uri.host()?.trim_matches(['[', ']']);
        let stream = tokio::net::TcpStream::connect((host, uri.port_u16().unwrap_or(80))).await.ok()?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
        tokio::spawn(connection);
        let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
        let request = Request::get(path).header("host", uri.authority()?.as_str());
        let response = sender.send_request(request.body(Empty::<Bytes>::new()).ok()?).await.ok()?;
        Some(response.status().as_u16() < 400)
    };
    runtime.is_ok_and(|runtime| {
        runtime
            .block_on(async { tokio::time::timeout(TRY, asked).await })
            .is_ok_and(|found| found == Some(true))
    })
}

/// Ends a script, and whatever its shell has become by exec.
pub(super) fn end(script: &mut Child) -> io::Result<()> {
    if script.try_wait()?.is_some() {
        return Ok(());
    }
    // It has not been waited for, so the number is its own.
    let pidfd = pidfd_open(Pid::from_child(script), PidfdFlags::empty())?;
    // It may have ended by itself.
    let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    script.wait().map(drop)
}

/// Starts a script in a shell. What it prints goes where plumb's messages go: stdout is the command's.
pub(super) fn start(script: &str, before: &Before) -> io::Result<Child> {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(script).stdin(Stdio::null()).stdout(io::stderr());
    let before = before.clone();
    // SAFETY: between fork and exec it makes system calls only.
    unsafe { shell.pre_exec(move || before.restore()) };
    shell.spawn()
}
