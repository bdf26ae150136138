//! The aggregation key of metrics: which container, systemd unit or executable a process belongs to.
//!
//! Derived from the cgroup path, which the runtimes build in well-known ways. A `.scope` is never a
//! group: under the systemd cgroup driver every container is a scope named by a hash.

/// Length of the shortened container id, as `docker ps` prints it.
const SHORT_ID: usize = 12;
const FULL_ID: usize = 64;

/// The group of a process.
///
/// `cgroups` is the text of /proc/PID/cgroup, `exe` the path of the executable (empty if unknown).
#[must_use]
pub(crate) fn of(cgroups: &str, exe: &str, comm: &str) -> String {
    let paths = || cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    if let Some(id) = paths().find_map(container) {
        return format!("container:{id}");
    }
    if let Some(unit) = paths().find_map(service) {
        return unit.to_owned();
    }
    let exe = exe.strip_suffix(" (deleted)").unwrap_or(exe);
    let base = exe.rsplit('/').next().unwrap_or_default();
    if base.is_empty() { comm.to_owned() } else { base.to_owned() }
}

/// The container id in a path such as `/system.slice/docker-<id>.scope`, `/docker/<id>` or
/// `/kubepods/burstable/pod<uid>/<id>`.
fn container(path: &str) -> Option<&str> {
    path.split('/').rev().find_map(|part| {
        let part = part.strip_suffix(".scope").unwrap_or(part);
        let id = part.rsplit(['-', ':']).next()?;
        (id.len() == FULL_ID && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| &id[..SHORT_ID])
    })
}

/// The innermost systemd service, except the per-user manager that holds everything of a login.
fn service(path: &str) -> Option<&str> {
    path.split('/').rev().find(|part| part.ends_with(".service") && !part.starts_with("user@"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f5e6d7c8b9a00112233445566778899aabbccddeeff00112233445566778899";

    #[test]
    fn containers_come_before_units_and_units_before_executables() {
        for path in [
            format!("0::/system.slice/docker-{ID}.scope"),
            format!("12:pids:/docker/{ID}\n0::/"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope"
            ),
            format!("0::/kubepods/besteffort/pod1/{ID}"),
            format!("0::/machine.slice/libpod-{ID}.scope/container"),
            format!("0::/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:{ID}"),
        ] {
            assert_eq!(of(&path, "/usr/bin/redis-server", "redis"), "container:4f5e6d7c8b9a", "{path}");
        }
        assert_eq!(of("0::/system.slice/nginx.service", "/usr/sbin/nginx", "nginx"), "nginx.service");
        assert_eq!(
            of("1:name=systemd:/system.slice/ssh.service\n0::/", "/usr/sbin/sshd", "sshd"),
            "ssh.service"
        );
    }

    #[test]
    fn scopes_and_user_managers_are_no_groups() {
        let user = "0::/user.slice/user-0.slice/user@0.service/app.slice/run-1.scope";
        assert_eq!(of(user, "/usr/bin/python3.11", "python3"), "python3.11");
        assert_eq!(of("0::/user.slice/user-0.slice/session-3.scope", "/usr/bin/bash", "bash"), "bash");
        assert_eq!(of("0::/", "/opt/app (deleted)", "app"), "app");
        assert_eq!(of("", "", "kworker/0:1"), "kworker/0:1");
    }
}
