use super::{super::How, *};

fn frame(module: &str, lines: &[(&str, &str)]) -> Frame {
    let line = |(function, file): &(&str, &str)| Line {
        function: (*function).to_owned(),
        file: (!file.is_empty()).then(|| (*file).to_owned()),
        line: None,
        inlined: false,
    };
    Frame {
        how: How::Tables,
        module: (!module.is_empty()).then(|| module.into()),
        build_id: None,
        offset: 0,
        lines: lines.iter().map(line).collect(),
    }
}

#[test]
fn the_headline_is_the_programs_own() {
    const LIBC: &str = "/usr/lib/x86_64-linux-gnu/libc.so.6";
    const APP: &str = "/srv/app";
    type Case<'a> = (&'a str, &'a [(&'a str, &'a [(&'a str, &'a str)])], Option<(usize, usize)>);
    let cases: [Case<'_>; 20] = [
        ("C", &[(LIBC, &[("open", "")]), (APP, &[("leak", "a.c")]), (APP, &[("main", "a.c")])], Some((1, 0))),
        (
            "static C",
            &[(APP, &[("__open64", "")]), (APP, &[("_IO_file_open", "")]), (APP, &[("leak", "")])],
            Some((2, 0)),
        ),
        (
            "static C with lines",
            &[
                (APP, &[("__socket", "../sysdeps/unix/sysv/linux/socket.c")]),
                (APP, &[("create_thread", "./nptl/pthread_create.c")]),
                (APP, &[("open", "/build/musl-1.2.5/src/fcntl/open.c")]),
                (APP, &[("socket", "/srv/src/socket.c")]),
            ],
            Some((3, 0)),
        ),
        (
            "C with functions like those of libc",
            &[(LIBC, &[("accept", "")]), (APP, &[("accept", "a.c")]), (APP, &[("main", "a.c")])],
            Some((1, 0)),
        ),
        ("stripped C", &[(LIBC, &[("open", "")]), (APP, &[])], None),
        (
            "C++",
            &[
                (LIBC, &[("open", "")]),
                ("/usr/lib/libstdc++.so.6.0.30", &[("std::x", "")]),
                (APP, &[("std::vector<int>::push_back(int)", "")]),
                (APP, &[("Pool::get()", "")]),
            ],
            Some((3, 0)),
        ),
        (
            "Rust",
            &[
                (LIBC, &[("open64", "")]),
                (APP, &[("std::sys::fs::unix::File::open_c", "x.rs")]),
                (APP, &[("<std::fs::File as std::io::Read>::read", "x.rs")]),
                (APP, &[("app::leak", "main.rs")]),
            ],
            Some((3, 0)),
        ),
        (
            "Rust, inlined",
            &[(LIBC, &[("open64", "")]), (APP, &[("std::fs::File::open", "x.rs"), ("app::leak", "main.rs")])],
            Some((1, 1)),
        ),
        (
            "Rust, line tables",
            &[(
                APP,
                &[
                    ("open<&str>", "/rustc/59807616/library/std/src/fs.rs"),
                    ("block_on", "/root/.cargo/registry/src/index/tokio-1.47.0/src/runtime.rs"),
                    ("get", "/root/.cargo/registry/src/index/tokio-pool-1.0.0/src/lib.rs"),
                ],
            )],
            Some((0, 2)),
        ),
        (
            "Rust closure",
            &[
                (APP, &[("<F as core::ops::function::FnOnce>::call_once", "x.rs")]),
                (APP, &[("<app::Job as app::Run>::run", "x.rs")]),
            ],
            Some((1, 0)),
        ),
        (
            "tokio",
            &[
                (APP, &[("mio::net::TcpStream::connect", "")]),
                (APP, &[("tokio::net::connect", "")]),
                (APP, &[("<app::Client as core::future::Future>::poll", "")]),
            ],
            Some((2, 0)),
        ),
        (
            "Go",
            &[
                (APP, &[("internal/runtime/syscall.Syscall6", "asm.s")]),
                (APP, &[("syscall.Open", "zsyscall.go")]),
                (APP, &[("os.OpenFile", "file.go")]),
                (APP, &[("net/http.(*Client).Do", "c.go")]),
                (APP, &[("main.leak", "main.go")]),
            ],
            Some((4, 0)),
        ),
        (
            "Go module",
            &[(APP, &[("os.Open", "file.go")]), (APP, &[("example.org/pool.(*Pool).Get", "pool.go")])],
            Some((1, 0)),
        ),
        (
            "Go generics",
            &[
                (APP, &[("slices.SortFunc[go.shape.[]example.org/x.T]", "sort.go")]),
                (APP, &[("main.main", "m.go")]),
            ],
            Some((1, 0)),
        ),
        (
            "Go only runtime",
            &[(APP, &[("runtime.clone", "sys.s")]), (APP, &[("runtime.newm", "proc.go")])],
            None,
        ),
        (
            "Python",
            &[
                (LIBC, &[("open64", "")]),
                ("/usr/bin/python3.12", &[("_io_FileIO___init___impl", "")]),
                ("/usr/bin/python3.12", &[("_PyEval_EvalFrameDefault", "")]),
                ("", &[("py::leak", "a.py")]),
            ],
            Some((3, 0)),
        ),
        (
            "Python extension",
            &[
                (LIBC, &[("open64", "")]),
                ("/srv/pool.so", &[("pool_get", "")]),
                ("/usr/bin/python3.12", &[("_PyEval_EvalFrameDefault", "")]),
                ("", &[("py::leak", "a.py")]),
            ],
            Some((1, 0)),
        ),
        (
            "Node",
            &[
                (LIBC, &[("open64", "")]),
                ("/usr/bin/node", &[("uv_fs_open", "")]),
                ("/usr/bin/node", &[("node::fs::Open", "")]),
                ("", &[("JS:~openSync", "node:fs")]),
                ("", &[("JS:*leak", "/srv/a.js")]),
            ],
            Some((4, 0)),
        ),
        (
            "C++ with nodes",
            &[(LIBC, &[("open", "")]), (APP, &[("uv_fs_open", "")]), (APP, &[("node::Pool::get()", "")])],
            Some((2, 0)),
        ),
        ("nothing", &[], None),
    ];
    for (name, frames, expected) in cases {
        let frames: Vec<_> = frames.iter().map(|(module, lines)| frame(module, lines)).collect();
        assert_eq!(origin_frame(&frames), expected, "{name}");
    }
}
