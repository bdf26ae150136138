//! The recipes of docs/check.md: `plumb check` around what people run in their tests, once clean and once with a leak.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

#[path = "../support/mod.rs"]
mod support;

use support::{TempDir, free_port, plumb};

/// A project in a folder of its own; with LEAK in the environment it leaks.
struct Project(TempDir);

impl Project {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = TempDir::new();
        for (name, text) in files {
            let path = dir.0.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Self(dir)
    }

    /// Runs a command there below plumb, with these options. The exit code, and the report.
    fn check(&self, leaks: bool, options: &[&str], command: &[&str]) -> (i32, Value) {
        let report = self.0.join("report.json");
        let mut check = plumb();
        check.args(["check", "-o", "json", "--report", &report]).args(options).arg("--").args(command);
        check.current_dir(&self.0.0).env("PATH", path_with_go()).env("GOCACHE", tools().join("go-cache"));
        check.env("GOTOOLCHAIN", "local").env("GOPROXY", "off").env("GOFLAGS", "-buildvcs=false");
        if leaks {
            check.env("LEAK", "1");
        }
        let output = check.output().unwrap();
        let text = fs::read_to_string(&report);
        let text =
            text.unwrap_or_else(|_| panic!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)));
        let document: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(document["lost"]["events"], 0, "{document}");
        (output.status.code().unwrap(), document)
    }

    /// Clean without the leak, and with it one finding, which is returned.
    fn is_clean_but_for_its_leak(&self, options: &[&str], command: &[&str]) -> Value {
        let (code, document) = self.check(false, options, command);
        assert_eq!((code, brief(&document)), (0, String::new()), "{command:?}");
        let (code, document) = self.check(true, options, command);
        assert_eq!(code, 3, "{command:?}: {}", brief(&document));
        let [finding] = &document["findings"].as_array().unwrap()[..] else {
            panic!("{command:?}: {document}")
        };
        assert_eq!(finding["kind"], "fd", "{document}");
        finding.clone()
    }
}

/// What a failure needs of a report.
fn brief(document: &Value) -> String {
    let finding = |finding: &Value| {
        let place = |function: &Value| format!("{}:{}", function["function"], function["line"]);
        let stack =
            finding["stack"].as_array().unwrap().iter().take(8).map(place).collect::<Vec<_>>().join(" < ");
        format!("{} x{} {stack} {}", finding["kind"], finding["count"], finding["examples"][0])
    };
    document["findings"].as_array().unwrap().iter().map(finding).collect::<Vec<_>>().join("\n")
}

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools")
}

/// With the Go that `cargo xtask test` installs.
fn path_with_go() -> std::ffi::OsString {
    let folders =
        fs::read_dir(tools()).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    let go = folders.filter(|path| path.join("go/bin/go").is_file()).map(|path| path.join("go/bin"));
    env::join_paths(go.chain(env::split_paths(&env::var_os("PATH").unwrap()))).unwrap()
}

/// Name and line of the function of a finding.
fn function(finding: &Value) -> (&str, u64) {
    let function = &finding["function"];
    (function["function"].as_str().unwrap_or_default(), function["line"].as_u64().unwrap_or(0))
}

fn crate_of_rust() -> Project {
    Project::new(&[
        (
            "Cargo.toml",
            "[package]\nname = \"sample\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[workspace]\n",
        ),
        (
            "src/lib.rs",
            "pub fn keep_open() {
    std::mem::forget(std::fs::File::open(\"/etc/hostname\").unwrap());
}

#[cfg(test)]
mod tests {
    #[test]
    fn reads() {
        assert!((0..5).all(|_| std::fs::read(\"/etc/hostname\").is_ok()));
        std::thread::spawn(|| 1).join().unwrap();
    }

    #[test]
    fn keeps() {
        if std::env::var_os(\"LEAK\").is_some() {
            (0..3).for_each(|_| super::keep_open());
        }
    }
}
",
        ),
    ])
}

#[test]
fn cargo_test() {
    let finding = crate_of_rust().is_clean_but_for_its_leak(&[], &["cargo", "test", "--offline", "--quiet"]);
    assert_eq!((function(&finding), &finding["count"]), (("sample::keep_open", 2), &Value::from(3)));
}

#[test]
fn cargo_nextest() {
    if env::var_os("PLUMB_NO_NEXTEST").is_some() {
        // Said by whoever set it: it is not in Debian.
        return;
    }
    let command = ["cargo", "nextest", "run", "--offline"];
    let finding = crate_of_rust().is_clean_but_for_its_leak(&[], &command);
    assert_eq!((function(&finding), &finding["count"]), (("sample::keep_open", 2), &Value::from(3)));
}

#[test]
fn pytest() {
    let project = Project::new(&[(
        "test_sample.py",
        "import os, subprocess, threading

def keep_open():
    return os.open('/etc/hostname', os.O_RDONLY)

def test_reads(tmp_path):
    (tmp_path / 'a').write_text('a')
    assert subprocess.run(['true']).returncode == 0
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()

def test_keeps():
    if 'LEAK' in os.environ:
        for _ in range(3):
            keep_open()
",
    )]);
    let command = ["/usr/bin/python3", "-m", "pytest", "-q", "-p", "no:cacheprovider"];
    let finding = project.is_clean_but_for_its_leak(&[], &command);
    // Without a perf map the stack ends in the interpreter: what it is tells.
    assert!(finding["examples"][0]["target"].as_str().unwrap().ends_with("hostname"), "{finding}");
    assert_eq!(finding["count"], 3, "{finding}");
}

#[test]
fn go_test() {
    let project = Project::new(&[
        ("go.mod", "module example.com/sample\n\ngo 1.24\n"),
        (
            "sample_test.go",
            "package sample

import (
\t\"os\"
\t\"testing\"
)

var kept []*os.File

//go:noinline
func keepOpen() {
\tfile, err := os.Open(\"/etc/hostname\")
\tif err != nil {
\t\tpanic(err)
\t}
\tkept = append(kept, file)
}

func TestReads(t *testing.T) {
\tif _, err := os.ReadFile(\"/etc/hostname\"); err != nil {
\t\tt.Fatal(err)
\t}
}

func TestKeeps(t *testing.T) {
\tif os.Getenv(\"LEAK\") != \"\" {
\t\tfor i := 0; i < 3; i++ {
\t\t\tkeepOpen()
\t\t}
\t}
}
",
        ),
    ]);
    let go = |arguments: &[&str]| {
        let done = Command::new("go")
            .args(arguments)
            .current_dir(&project.0.0)
            .env("PATH", path_with_go())
            .env("GOCACHE", tools().join("go-cache"))
            .env("GOTOOLCHAIN", "local")
            .status();
        assert!(done.unwrap().success());
    };
    // The toolchain's own assembler keeps every file that it reads: the test binary is what is checked.
    go(&["test", "-c", "-o", "sample.test"]);
    let finding = project.is_clean_but_for_its_leak(&[], &["./sample.test"]);
    assert_eq!(function(&finding), ("example.com/sample.keepOpen", 12), "{finding}");
    assert_eq!(finding["count"], 3, "{finding}");
}

#[test]
fn npm_test() {
    let project = Project::new(&[
        (
            "package.json",
            "{ \"name\": \"sample\", \"version\": \"1.0.0\", \"scripts\": { \"test\": \"node --test\" } }",
        ),
        (
            "sample.test.js",
            "const { test } = require('node:test');
const fs = require('node:fs');
function keepOpen() { return fs.openSync('/etc/hostname', 'r'); }
test('reads', () => { fs.readFileSync('/etc/hostname'); });
test('keeps', () => { if (process.env.LEAK) { for (let i = 0; i < 3; i++) keepOpen(); } });
",
        ),
    ]);
    let finding = project.is_clean_but_for_its_leak(&[], &["npm", "test"]);
    assert!(finding["examples"][0]["target"].as_str().unwrap().ends_with("hostname"), "{finding}");
    assert_eq!(finding["count"], 3, "{finding}");
}

#[test]
fn shell_script() {
    let project = Project::new(&[(
        "script.sh",
        "ls / | sort > /dev/null\nread -r name < /etc/hostname\n(echo a; echo b) | while read -r line; do :; done\n\
         [ -z \"$LEAK\" ] || for i in 1 2 3; do exec {fd}</etc/hostname; done\nexit 0\n",
    )]);
    let finding = project.is_clean_but_for_its_leak(&[], &["bash", "script.sh"]);
    assert!(finding["examples"][0]["target"].as_str().unwrap().ends_with("hostname"), "{finding}");
}

#[test]
fn daemon_under_steady_load() {
    let port = free_port().to_string();
    let project = Project::new(&[(
        "server.py",
        "import os, socket, sys
server = socket.create_server(('127.0.0.1', int(sys.argv[1])))
while True:
    client, _ = server.accept()
    if 'LEAK' in os.environ:
        os.open('/etc/hostname', os.O_RDONLY)
    client.recv(1)
    client.close()
",
    )]);
    let load =
        format!("exec bash -c 'for i in 1 2 3 4; do exec 3<>/dev/tcp/127.0.0.1/{port}; echo x >&3; done'");
    let options = ["--steady", &load, "--ready", &port];
    let finding = project.is_clean_but_for_its_leak(&options, &["/usr/bin/python3", "server.py", &port]);
    assert_eq!(
        (&finding["grows"], &finding["syscall"]),
        (&Value::from(true), &Value::from("openat")),
        "{finding}"
    );
}

#[test]
fn real_servers_are_clean_under_steady_load_and_when_they_stop() {
    let project = Project::new(&[("www/index.html", "hello\n")]);
    let [web, data] = [(); 2].map(|()| free_port().to_string());
    let folder = project.0.join("");
    let nginx = format!(
        "worker_processes 2; pid {folder}pid; error_log {folder}error.log; daemon off; user root;
         events {{ worker_connections 256; }}
         http {{ access_log off; server {{ listen 127.0.0.1:{web}; root {folder}www; }} }}"
    );
    let config = project.0.join("nginx.conf");
    fs::write(&config, nginx).unwrap();
    let url = format!("http://127.0.0.1:{web}/");
    let get = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{web}; printf \"GET / HTTP/1.0\\r\\n\\r\\n\" >&3; cat <&3 >/dev/null"
    );
    let load = format!("exec bash -c 'for i in 1 2 3 4 5 6 7 8 9; do {get}; done'");
    let options = ["--steady", &load, "--ready", &url, "--stop", "QUIT"];
    let (code, document) = project.check(false, &options, &["nginx", "-c", &config]);
    assert_eq!((code, brief(&document)), (0, String::new()));
    let load = format!("redis-benchmark -q -p {data} -n 2000 -c 10 -t get");
    let options = ["--stop", "TERM", "--ready", &data, "--load", &load];
    let server = ["redis-server", "--port", &data, "--save", ""];
    let (code, document) = project.check(false, &options, &server);
    assert_eq!((code, brief(&document)), (0, String::new()));
}

#[test]
fn ordinary_commands_are_clean() {
    let project = Project::new(&[("Cargo.toml", "")]);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let source = source.to_str().unwrap();
    let commands: [&[&str]; 4] = [
        &["true"],
        &["sh", "-c", "ls -R /usr > /dev/null"],
        &["git", "-C", source, "-c", "safe.directory=*", "status"],
        &["tar", "cf", "/dev/null", "/usr/include"],
    ];
    for command in commands {
        let (code, document) = project.check(false, &[], command);
        assert_eq!((code, brief(&document)), (0, String::new()), "{command:?}");
    }
    let crate_of_rust = crate_of_rust();
    let (code, document) = crate_of_rust.check(false, &[], &["cargo", "build", "--offline", "--quiet"]);
    assert_eq!((code, brief(&document)), (0, String::new()));
}
