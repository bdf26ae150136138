//! Kernel struct fields that the programs read, named once.
//!
//! rustc emits no CO-RE relocations, so the agent resolves each path in the kernel's own BTF and passes
//! the byte offsets to the programs as one read-only array before they are loaded. A field that this
//! kernel does not have is `MISSING`; the verifier removes the code that would read it.

/// The kernel has no such field.
pub const MISSING: u32 = u32::MAX;

macro_rules! offsets {
    ($($name:ident = $path:literal,)+) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "names become constants below")]
        enum Index { $($name,)+ LEN }
        $(
            #[doc = concat!("Index of `", $path, "`.")]
            pub const $name: usize = Index::$name as usize;
        )+
        /// Number of fields.
        pub const LEN: usize = Index::LEN as usize;
        /// `struct.field[.field]` of each, by index. `[]` at the end is the size of one array element.
        pub const PATHS: [&str; LEN] = [$($path,)+];
    };
}

offsets! {
    TASK_PID = "task_struct.pid",
    TASK_TGID = "task_struct.tgid",
    TASK_COMM = "task_struct.comm",
    TASK_FLAGS = "task_struct.flags",
    TASK_STATE = "task_struct.__state",
    TASK_STATE_BEFORE_5_14 = "task_struct.state",
    TASK_EXIT_STATE = "task_struct.exit_state",
    TASK_EXIT_CODE = "task_struct.exit_code",
    TASK_EXEC_ID = "task_struct.self_exec_id",
    TASK_START_BOOTTIME = "task_struct.start_boottime",
    TASK_GROUP_LEADER = "task_struct.group_leader",
    TASK_REAL_PARENT = "task_struct.real_parent",
    TASK_FILES = "task_struct.files",
    TASK_SIGNAL = "task_struct.signal",
    TASK_MM = "task_struct.mm",
    TASK_CRED = "task_struct.cred",
    TASK_CSS_SET = "task_struct.cgroups",
    TASK_THREAD_STATUS = "task_struct.thread_info.status",
    TASK_STACK = "task_struct.stack",
    TASK_FSBASE = "task_struct.thread.fsbase",
    CRED_UID = "cred.uid",
    SIGNAL_NR_THREADS = "signal_struct.nr_threads",
    SIGNAL_LIVE = "signal_struct.live",
    SIGNAL_FLAGS = "signal_struct.flags",
    SIGNAL_RLIM = "signal_struct.rlim",
    MM_START_STACK = "mm_struct.start_stack",
    MM_RSS_STAT_STRIDE = "mm_struct.rss_stat[]",
    MM_RSS_STAT_COUNT = "mm_struct.rss_stat.count",
    FILES_FDT = "files_struct.fdt",
    FDT_MAX_FDS = "fdtable.max_fds",
    FDT_FD = "fdtable.fd",
    FDT_OPEN_FDS = "fdtable.open_fds",
    FDT_CLOSE_ON_EXEC = "fdtable.close_on_exec",
    FILE_INODE = "file.f_inode",
    FILE_FLAGS = "file.f_flags",
    FILE_POS = "file.f_pos",
    FILE_DENTRY = "file.f_path.dentry",
    FILE_PRIVATE_DATA = "file.private_data",
    DENTRY_NAME = "dentry.d_name.name",
    INODE_MODE = "inode.i_mode",
    INODE_INO = "inode.i_ino",
    INODE_SB = "inode.i_sb",
    SB_MAGIC = "super_block.s_magic",
    SB_DEV = "super_block.s_dev",
    SOCKET_TYPE = "socket.type",
    SOCKET_SK = "socket.sk",
    SOCK_FAMILY = "sock_common.skc_family",
    SOCK_STATE = "sock_common.skc_state",
    SOCK_NUM = "sock_common.skc_num",
    SOCK_DPORT = "sock_common.skc_dport",
    SOCK_LOCAL4 = "sock_common.skc_rcv_saddr",
    SOCK_REMOTE4 = "sock_common.skc_daddr",
    SOCK_LOCAL6 = "sock_common.skc_v6_rcv_saddr",
    SOCK_REMOTE6 = "sock_common.skc_v6_daddr",
    SOCK_SOURCE = "inet_sock.inet_sport",
    SOCK_NET = "sock_common.skc_net.net",
    SOCK_FLAGS = "sock_common.skc_flags",
    SOCK_SOCKET = "sock.sk_socket",
    SOCK_ERR = "sock.sk_err",
    SOCK_PROTOCOL = "sock.sk_protocol",
    SOCK_BACKLOG = "sock.sk_ack_backlog",
    NET_INUM = "net.ns.inum",
    TCP_COPIED = "tcp_sock.copied_seq",
    TCP_RECEIVED = "tcp_sock.rcv_nxt",
    TCP_WRITTEN = "tcp_sock.write_seq",
    TCP_UNACKED = "tcp_sock.snd_una",
    TCP_BYTES_SENT = "tcp_sock.bytes_sent",
    TCP_LAST_SENT = "tcp_sock.lsndtime",
    TCP_BYTES_RECEIVED = "tcp_sock.bytes_received",
    TCP_LAST_ACKNOWLEDGING = "tcp_sock.snd_wl1",
    TCP_LAST_RECEIVED = "inet_connection_sock.icsk_ack.lrcvtime",
    SKB_HEAD = "sk_buff.head",
    SKB_DATA = "sk_buff.data",
    SKB_LEN = "sk_buff.len",
    SKB_TRANSPORT = "sk_buff.transport_header",
    SKB_NETWORK = "sk_buff.network_header",
    SKB_DEVICE = "sk_buff.dev",
    DEVICE_NET = "net_device.nd_net.net",
    SIGINFO_CODE = "kernel_siginfo.si_code",
    SIGACTION_HANDLER = "k_sigaction.sa.sa_handler",
}
