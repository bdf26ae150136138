//! Calls on fds that are there: copies, closes, marks.

use crate::{
    Path, Result, Stage,
    create::one,
    path,
    sys::{Helper, dup_above, pid, sys},
};

/// Above whatever a program's start takes, so that nothing else gets the number.
pub(crate) const HIGH: i32 = 500;
const CLOEXEC: u32 = 4;
const UNSHARE: u32 = 2;

pub(crate) const PATHS: &[Path] = &[
    path("dup", "dup(2)", |stage| one(stage, || sys!(libc::SYS_dup, 0))),
    path("dup2", "dup2(2) to a number that is free", |stage| one(stage, || sys!(libc::SYS_dup2, 0, HIGH))),
    path("dup2-over", "dup2(2) over an open fd, which is closed", |stage| {
        let over = dup_above(0, HIGH)?;
        replace(stage, over, || sys!(libc::SYS_dup2, 1, over))
    }),
    path("dup2-same", "dup2(2) of an fd to itself: nothing happens", |stage| {
        stage.begin()?;
        sys!(libc::SYS_dup2, 0, 0).map(drop)
    }),
    path("dup3", "dup3(2) to a number that is free", |stage| {
        one(stage, || sys!(libc::SYS_dup3, 0, HIGH, libc::O_CLOEXEC))
    }),
    path("dup3-over", "dup3(2) over an open fd", |stage| {
        let over = dup_above(0, HIGH)?;
        replace(stage, over, || sys!(libc::SYS_dup3, 1, over, 0))
    }),
    path("fcntl-dupfd", "fcntl(2) F_DUPFD", |stage| one(stage, || dup_above(0, HIGH))),
    path("fcntl-dupfd-cloexec", "fcntl(2) F_DUPFD_CLOEXEC", |stage| {
        one(stage, || sys!(libc::SYS_fcntl, 0, libc::F_DUPFD_CLOEXEC, HIGH))
    }),
    path("fcntl-dupfd-query", "fcntl(2) F_DUPFD_QUERY: only a question", |stage| {
        const F_DUPFD_QUERY: i32 = 1027;
        stage.begin()?;
        sys!(libc::SYS_fcntl, 0, F_DUPFD_QUERY, 1).map(drop)
    }),
    path("close", "close(2)", |stage| {
        let fd = dup_above(0, HIGH)?;
        stage.begin()?;
        sys!(libc::SYS_close, fd)?;
        stage.closed(fd);
        Ok(())
    }),
    path("close-failed", "close(2) of a number that is not open", |stage| {
        stage.begin()?;
        match sys!(libc::SYS_close, HIGH) {
            Err(_) => Ok(()),
            Ok(_) => Err(std::io::Error::other("it was open")),
        }
    }),
    path("close-range", "close_range(2)", |stage| {
        let fds = [dup_above(0, HIGH)?, dup_above(0, HIGH)?];
        stage.begin()?;
        sys!(libc::SYS_close_range, fds[0], fds[1] + 10, 0)?;
        fds.into_iter().for_each(|fd| stage.closed(fd));
        Ok(())
    }),
    path("close-range-all", "close_range(2) from 3 to the end", |stage| {
        let fds = [dup_above(0, HIGH)?, dup_above(0, HIGH)?];
        stage.begin()?;
        sys!(libc::SYS_close_range, 3, u32::MAX, 0)?;
        fds.into_iter().for_each(|fd| stage.closed(fd));
        Ok(())
    }),
    path("close-range-cloexec", "close_range(2) with CLOSE_RANGE_CLOEXEC: a mark, counts stay", |stage| {
        let fds = [dup_above(0, HIGH)?, dup_above(0, HIGH)?];
        stage.begin()?;
        sys!(libc::SYS_close_range, fds[0], fds[1], CLOEXEC)?;
        fds.into_iter().for_each(|fd| stage.claim("cloexec", pid(), fd));
        Ok(())
    }),
    path(
        "close-range-unshare",
        "close_range(2) with CLOSE_RANGE_UNSHARE: the process that shared the table keeps the fds",
        |stage| {
            let fd = dup_above(0, HIGH)?;
            Helper::idle(libc::CLONE_FILES)?;
            stage.begin()?;
            sys!(libc::SYS_close_range, fd, fd, UNSHARE)?;
            stage.closed(fd);
            Ok(())
        },
    ),
    path("fcntl-setfd", "fcntl(2) F_SETFD: a mark for exec, counts stay", |stage| {
        let fd = dup_above(0, HIGH)?;
        stage.begin()?;
        sys!(libc::SYS_fcntl, fd, libc::F_SETFD, libc::FD_CLOEXEC)?;
        stage.claim("cloexec", pid(), fd);
        Ok(())
    }),
    path("fioclex", "ioctl FIOCLEX: the same mark", |stage| {
        let fd = dup_above(0, HIGH)?;
        stage.begin()?;
        sys!(libc::SYS_ioctl, fd, libc::FIOCLEX)?;
        stage.claim("cloexec", pid(), fd);
        Ok(())
    }),
];

pub(crate) fn replace(stage: &mut Stage, over: i32, call: impl FnOnce() -> Result<i32>) -> Result<()> {
    stage.begin()?;
    call()?;
    stage.claim("replaced", pid(), over);
    Ok(())
}
