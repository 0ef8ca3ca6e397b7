"""Linux's numbers of the system calls that a confined program may make, for each processor architecture.

Calls that are not listed are refused: sockets, new processes and threads, signals to others, modes and owners of files,
mounts, tracing, shared memory, io_uring, and the calls of later kernels.
"""

# "name x86_64 aarch64"; "-": this architecture has no such call
FREE = """
read 0 63 | write 1 64 | readv 19 65 | writev 20 66 | pread64 17 67 | pwrite64 18 68 | preadv 295 69
pwritev 296 70 | preadv2 327 286 | pwritev2 328 287 | lseek 8 62 | close 3 57 | close_range 436 436 | stat 4 -
lstat 6 - | fstat 5 80 | newfstatat 262 79 | statx 332 291 | access 21 - | faccessat 269 48 | faccessat2 439 439
readlink 89 - | readlinkat 267 78 | getdents 78 - | getdents64 217 61 | getcwd 79 17 | chdir 80 49
fchdir 81 50 | mkdir 83 - | mkdirat 258 34 | rmdir 84 - | unlink 87 - | unlinkat 263 35 | rename 82 -
renameat 264 38 | renameat2 316 276 | symlink 88 - | symlinkat 266 36 | ftruncate 77 46 | fsync 74 82
fdatasync 75 83 | flock 73 32 | fadvise64 221 223 | statfs 137 43 | fstatfs 138 44 | umask 95 166
sendfile 40 71 | copy_file_range 326 285 | dup 32 23 | dup2 33 - | dup3 292 24 | pipe 22 - | pipe2 293 59
poll 7 - | ppoll 271 73 | select 23 - | pselect6 270 72 | epoll_create 213 - | epoll_create1 291 20
epoll_ctl 233 21 | epoll_wait 232 - | epoll_pwait 281 22 | epoll_pwait2 441 441 | eventfd2 290 19 | brk 12 214
mmap 9 222 | munmap 11 215 | mremap 25 216 | mprotect 10 226 | madvise 28 233 | mincore 27 232
membarrier 324 283 | rt_sigaction 13 134 | rt_sigprocmask 14 135 | rt_sigreturn 15 139 | rt_sigpending 127 136
rt_sigtimedwait 128 137 | rt_sigsuspend 130 133 | sigaltstack 131 132 | pause 34 - | alarm 37 -
setitimer 38 103 | getitimer 36 102 | restart_syscall 219 128 | nanosleep 35 101 | clock_nanosleep 230 115
clock_gettime 228 113 | clock_getres 229 114 | gettimeofday 96 169 | time 201 - | times 100 153
getrusage 98 165 | sysinfo 99 179 | uname 63 160 | getrandom 318 278 | getcpu 309 168 | getpid 39 172
getppid 110 173 | gettid 186 178 | getuid 102 174 | geteuid 107 175 | getgid 104 176 | getegid 108 177
getresuid 118 148 | getresgid 120 150 | getgroups 115 158 | getpgrp 111 - | getpgid 121 155 | getsid 124 156
getpriority 140 141 | getrlimit 97 163 | sched_yield 24 124 | sched_getaffinity 204 123 | sched_getparam 143 121
sched_getscheduler 145 120 | sched_get_priority_max 146 125 | sched_get_priority_min 147 126 | futex 202 98
set_robust_list 273 99 | set_tid_address 218 96 | rseq 334 293 | arch_prctl 158 - | exit 60 93
exit_group 231 94
"""
# Allowed for some arguments only, refused with another error, or made before the filter is installed.
OTHERS = """
open 2 - | openat 257 56 | ioctl 16 29 | fcntl 72 25 | kill 62 129 | tkill 200 130 | tgkill 234 131
prlimit64 302 261 | clone3 435 435 | openat2 437 437 | capset 126 91 | prctl 157 167 | seccomp 317 277
landlock_create_ruleset 444 444 | landlock_add_rule 445 445 | landlock_restrict_self 446 446
"""


def read_syscalls(machine: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return name -> number for the free calls and for the others; ``KeyError`` for an unknown architecture."""
    column = {"x86_64": 1, "aarch64": 2}[machine]
    tables = ([entry.split() for entry in text.replace("\n", " | ").split(" | ") if entry] for text in (FREE, OTHERS))
    free, others = ({e[0]: int(e[column]) for e in table if e[column] != "-"} for table in tables)
    return free, others
