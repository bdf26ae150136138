//! Real servers in tiers: HAProxy before nginx before gunicorn, which asks redis and PostgreSQL.

use std::{
    fs,
    net::TcpStream,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{TempDir, free_port, support::Running};

/// Who is killed is gone in that time.
const ENDS: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A server of a tier; with its descendants it is killed when the test is over.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) port: u16,
    running: Running,
}

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.running.pid()
    }

    pub(crate) fn is_there(&mut self) -> bool {
        self.running.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Held before their parent is killed: whoever has a number now has it for as long as he is held.
        let descendants: Vec<_> = descendants(self.pid()).into_iter().filter_map(open).collect();
        let _ = self.running.0.kill();
        for pidfd in &descendants {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        // PostgreSQL does not start again while a process has the memory of the one before.
        for pidfd in &descendants {
            let _ = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&ENDS));
        }
    }
}

fn open(pid: u32) -> Option<std::os::fd::OwnedFd> {
    pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()
}

fn descendants(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children: Vec<u32> = children.split_whitespace().map(|child| child.parse().unwrap()).collect();
    children.iter().flat_map(|child| [*child].into_iter().chain(descendants(*child))).collect()
}

fn start(name: &'static str, port: u16, log: &Path, command: &mut Command) -> Server {
    let out = fs::File::options().create(true).append(true).open(log).unwrap();
    let errors = out.try_clone().unwrap();
    let child = command.stdin(Stdio::null()).stdout(out).stderr(errors).spawn().unwrap();
    let mut server = Server { name, port, running: Running(child) };
    let end = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        let log = || fs::read_to_string(log).unwrap_or_default();
        assert!(server.is_there() && Instant::now() < end, "{name} does not answer: {}", log());
        sleep(Duration::from_millis(20));
    }
    server
}

/// Where the servers keep what they need.
pub(crate) struct Folder {
    dir: TempDir,
    postgres: PathBuf,
}

const APPLICATION: &str = "\
import os, socket, threading
import psycopg2

local = threading.local()

def app(environ, start):
    if not hasattr(local, 'redis'):
        local.redis = socket.create_connection(('127.0.0.1', int(os.environ['REDIS'])))
        local.pg = psycopg2.connect(host='127.0.0.1', port=os.environ['POSTGRES'], user='postgres', dbname='postgres')
        local.pg.autocommit = True
    local.redis.sendall(b'INCR n\\r\\n')
    body = local.redis.recv(100)
    cursor = local.pg.cursor()
    cursor.execute('select pg_sleep(0.01)')
    cursor.fetchall()
    start('200 OK', [('Content-Length', str(len(body)))])
    return [body]
";

impl Folder {
    pub(crate) fn new() -> Self {
        let dir = TempDir::new();
        let postgres = Path::new("/usr/lib/postgresql").read_dir().unwrap();
        let postgres = postgres.map(|version| version.unwrap().path().join("bin")).max().unwrap();
        fs::write(dir.0.join("application.py"), APPLICATION).unwrap();
        let data = dir.0.join("data");
        fs::create_dir(&data).unwrap();
        let (uid, gid) = postgres_user();
        chown(&data, Some(uid), Some(gid)).unwrap();
        let folder = Self { dir, postgres };
        let made = folder
            .as_postgres("initdb")
            .args(["--auth=trust", "--no-sync", "--pgdata"])
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        folder
    }

    fn as_postgres(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        command.arg(self.postgres.join(program)).current_dir("/");
        command
    }

    fn log(&self) -> PathBuf {
        self.dir.0.join("log")
    }

    /// nginx with so many workers, before another server or answering by itself.
    pub(crate) fn nginx(&self, upstream: Option<u16>) -> Server {
        let port = free_port();
        let (before, location) = match upstream {
            Some(upstream) => (
                format!("upstream next {{ server 127.0.0.1:{upstream}; keepalive 16; }}"),
                "proxy_pass http://next; proxy_http_version 1.1; proxy_set_header Connection '';",
            ),
            None => (String::new(), "return 200 'hello';"),
        };
        let folder = self.dir.0.display();
        let config = format!(
            "daemon off; worker_processes 2; pid {folder}/nginx.pid; error_log stderr crit;\n\
             events {{ worker_connections 256; }}\n\
             http {{ access_log off; keepalive_requests 100000; client_body_temp_path {folder}/body;\n\
             proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fcgi; uwsgi_temp_path {folder}/uwsgi;\n\
             scgi_temp_path {folder}/scgi; {before}\n\
             server {{ listen 127.0.0.1:{port}; location / {{ {location} }} }} }}\n"
        );
        let path = self.dir.join("nginx.conf");
        fs::write(&path, config).unwrap();
        let mut command = Command::new("/usr/sbin/nginx");
        start("nginx", port, &self.log(), command.args(["-e", "stderr", "-c", &path]))
    }

    fn haproxy(&self, upstream: u16) -> Server {
        let port = free_port();
        let config = format!(
            "global\n maxconn 256\n\
             defaults\n mode http\n timeout connect 30s\n timeout client 10s\n timeout server 60s\n\
             frontend front\n bind 127.0.0.1:{port}\n default_backend next\n\
             backend next\n server next 127.0.0.1:{upstream}\n"
        );
        let path = self.dir.join("haproxy.cfg");
        fs::write(&path, config).unwrap();
        let mut command = Command::new("/usr/sbin/haproxy");
        start("haproxy", port, &self.log(), command.args(["-db", "-f", &path]))
    }

    fn gunicorn(&self, redis: u16, postgres: u16) -> Server {
        let port = free_port();
        let mut command = Command::new("/usr/bin/gunicorn");
        command
            .args(["--workers=2", "--worker-class=gthread", "--threads=8", "--keep-alive=30"])
            .args(["--graceful-timeout=10", "--log-level=error", "--bind", &format!("127.0.0.1:{port}")])
            .args(["--chdir", &self.dir.0.display().to_string(), "application:app"])
            .env("REDIS", redis.to_string())
            .env("POSTGRES", postgres.to_string());
        start("gunicorn", port, &self.log(), &mut command)
    }

    fn redis(&self) -> Server {
        let port = free_port();
        let mut command = Command::new("/usr/bin/redis-server");
        command.args(["--port", &port.to_string(), "--save", "", "--dir", &self.dir.0.display().to_string()]);
        start("redis", port, &self.log(), &mut command)
    }

    fn postgresql(&self) -> Server {
        let port = free_port();
        let mut command = self.as_postgres("postgres");
        command.arg("-D").arg(self.dir.0.join("data")).args([
            "-p",
            &port.to_string(),
            "-c",
            "fsync=off",
            "-c",
            "unix_socket_directories=",
        ]);
        start("postgresql", port, &self.log(), &mut command)
    }

    /// The innermost first.
    pub(crate) fn tiers(&self) -> Vec<Server> {
        let (postgresql, redis) = (self.postgresql(), self.redis());
        let gunicorn = self.gunicorn(redis.port, postgresql.port);
        let nginx = self.nginx(Some(gunicorn.port));
        let haproxy = self.haproxy(nginx.port);
        vec![postgresql, redis, gunicorn, nginx, haproxy]
    }
}

/// User and group that PostgreSQL runs as: it refuses to be root.
fn postgres_user() -> (u32, u32) {
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let user = users.lines().find(|line| line.starts_with("postgres:")).unwrap();
    let fields: Vec<&str> = user.split(':').collect();
    (fields[2].parse().unwrap(), fields[3].parse().unwrap())
}
