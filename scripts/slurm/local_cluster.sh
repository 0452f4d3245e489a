#!/usr/bin/env bash
# A real SLURM of two nodes on this machine, for development and CI: munge, slurmctld, two slurmd, and slurmdbd over
# MariaDB, since a job that dies hard is noticed through `sacct` alone.
#
#   scripts/slurm/local_cluster.sh start         starts whatever is not running; says which file to `source`
#   scripts/slurm/local_cluster.sh status        nodes and jobs
#   scripts/slurm/local_cluster.sh stop [--wipe] cancels the jobs and ends the daemons; --wipe removes the folder too
#
# Needs root and Debian's packages, which `start` installs. All files are in one folder, KD_SLURM_DIR (/tmp/kd-slurm);
# nothing in /etc or /var is written and no other munge, SLURM or MariaDB of the machine is touched. Its TCP ports begin
# at KD_SLURM_PORT (27100): not in 15000-24999, where Lightning puts MASTER_PORT, and not among the ephemeral ones.
# Partitions: main (a job is preempted by its own --signal, 30 s before the requeue) and high (preempts main).
set -euo pipefail
dir=$(realpath -m "${KD_SLURM_DIR:-/tmp/kd-slurm}")
port=${KD_SLURM_PORT:-27100}
packages="slurm-wlm munge slurmdbd mariadb-server-core mariadb-client-core"
daemons="slurmd-1 slurmd-2 slurmctld slurmdbd mariadbd munged"
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/etc/slurm.conf

fail() { echo "local_cluster: $*" >&2; exit 1; }
command -v flock >/dev/null || fail "needs flock (apt-get install util-linux)"

# Every daemon carries its name in its environment: by that, not by a pid that may be another's by now, it is known.
launch() { # launch NAME COMMAND...
  env KD_SLURM_DAEMON="$dir/$1" setsid "${@:2}" </dev/null >>"$dir/log/$1.out" 2>&1 9>&- &
}
pids() { # the processes of a daemon; a slurmd's step daemons count as its own
  { grep -lzxF "KD_SLURM_DAEMON=$dir/$1" /proc/[0-9]*/environ || true; } 2>/dev/null | cut -d/ -f3
}
runs() {
  local pid
  for pid in $(pids "$1"); do [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%-*}" ] && return 0; done
  return 1
}
within() { # within SECONDS COMMAND...: wait until it succeeds
  local deadline=$((SECONDS + $1))
  until "${@:2}" >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.1
  done
}
listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
ready() { [ "$(timeout 5 sinfo -h -p main -N -o %t | grep -cxE 'idle|mix|alloc|comp')" = 2 ]; } # "idle*": no answer yet

install_packages() {
  local program
  for program in munged slurmctld slurmd slurmdbd mariadbd mariadb-install-db; do
    command -v $program >/dev/null && continue
    command -v apt-get >/dev/null || fail "needs $program: install what Debian calls $packages"
    echo "local_cluster: installing $packages"
    # shellcheck disable=SC2086
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages; } \
      >"$dir/log/apt.log" 2>&1 || fail "apt-get could not install $packages (no network?); see $dir/log/apt.log"
    return
  done
}

write_settings() {
  local host
  host=$(hostname -s)
  [ -s "$dir/etc/munge.key" ] || (umask 077 && head -c 256 /dev/urandom >"$dir/etc/munge.key")
  # cred_expire: a requeued job waits that long before it starts again (default: 2 minutes).
  # SlurmdTimeout: a dead node is noticed, and its jobs are requeued, after so many seconds.
  # The nodes are named as they are reached, so that Lightning's MASTER_ADDR, the first of them, resolves.
  cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=kd
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$dir/run/munge.sock
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=20
ReturnToService=2
KillWait=10
MinJobAge=3600
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=127.0.0.1 NodeAddr=127.0.0.1 NodeHostname=$host Port=$((port + 11)) CPUs=4 RealMemory=8000
NodeName=127.0.0.2 NodeAddr=127.0.0.1 NodeHostname=$host Port=$((port + 12)) CPUs=4 RealMemory=8000
PartitionName=main Nodes=127.0.0.[1-2] Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=127.0.0.[1-2] PriorityTier=10 PreemptMode=OFF
CONF
  echo "CgroupPlugin=cgroup/v1" >"$dir/etc/cgroup.conf" # unused, but the default looks for /sys/fs/cgroup
  cat >"$dir/etc/slurmdbd.conf" <<CONF
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_accounting
PidFile=$dir/run/slurmdbd.pid
LogFile=$dir/log/slurmdbd.log
CONF
  chmod 600 "$dir/etc/slurmdbd.conf" # slurmdbd refuses one that others may read
  cat >"$dir/etc/users.sql" <<CONF
create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm';
grant all on slurm_accounting.* to 'slurm'@'127.0.0.1';
CONF
  cat >"$dir/etc/mariadb.cnf" <<CONF
[mariadbd]
user=root
datadir=$dir/database
socket=$dir/run/mariadb.sock
pid-file=$dir/run/mariadb.pid
bind-address=127.0.0.1
port=$((port + 2))
init-file=$dir/etc/users.sql
skip-log-bin
skip-name-resolve
innodb_log_file_size=8M
innodb_flush_log_at_trx_commit=0
CONF
  echo "export SLURM_CONF=$SLURM_CONF" >"$dir/env.sh"
}

start() {
  [ "$(id -u)" = 0 ] || fail "needs root, which runs munge, slurmctld and slurmd"
  mkdir -p "$dir"/{etc,run,log,state,spool/127.0.0.1,spool/127.0.0.2}
  exec 9>"$dir/lock" && flock 9 # one start at a time
  install_packages
  write_settings
  runs munged || { rm -f "$dir/run/munge.sock"*
    launch munged munged --foreground --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.sock" \
      --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"; }
  within 10 munge -n -S "$dir/run/munge.sock" || fail "munge does not answer; see $dir/log"
  [ -d "$dir/database/mysql" ] || mariadb-install-db --defaults-file="$dir/etc/mariadb.cnf" --user=root \
    --auth-root-authentication-method=normal --skip-test-db >"$dir/log/mariadb-install.log" 2>&1 ||
    fail "MariaDB could not make its tables; see $dir/log/mariadb-install.log"
  runs mariadbd || launch mariadbd mariadbd --defaults-file="$dir/etc/mariadb.cnf"
  within 30 listens $((port + 2)) || fail "MariaDB does not answer; see $dir/log/mariadbd.out"
  runs slurmdbd || launch slurmdbd slurmdbd -D
  within 30 sacctmgr -n list cluster || fail "slurmdbd does not answer; see $dir/log/slurmdbd.log"
  sacctmgr -n list cluster | grep -qw kd || sacctmgr -i add cluster kd >"$dir/log/sacctmgr.out" # slurmctld needs it
  runs slurmctld || launch slurmctld slurmctld -D
  within 30 listens "$port" || fail "slurmctld does not answer; see $dir/log/slurmctld.log"
  for node in 1 2; do runs slurmd-$node || launch slurmd-$node slurmd -D -N 127.0.0.$node; done
  within 60 ready || fail "the nodes are not ready after 60 s; see $dir/log: $(timeout 5 sinfo -h 2>&1 | tr -s ' \n' ' ')"
  echo "SLURM is up: source $dir/env.sh"
}

end() { # end NAME: TERM, and KILL after 10 s
  local found
  found=$(pids "$1")
  [ -n "$found" ] || return 0
  # shellcheck disable=SC2086
  kill $found 2>/dev/null || true
  # shellcheck disable=SC2016
  within 10 eval '[ -z "$(pids '"$1"')" ]' || kill -9 $(pids "$1") 2>/dev/null || true
}

stop() {
  [ -d "$dir/etc" ] || { echo "local_cluster: there is none in $dir"; exit 0; }
  if runs slurmctld; then
    timeout 10 squeue -h -o %A | sort -u | xargs -r timeout 10 scancel || true
    # shellcheck disable=SC2016
    within 20 eval '[ -z "$(timeout 5 squeue -h)" ]' || true
  fi
  for name in $daemons; do end "$name"; done
  rm -f "$dir/env.sh"
  if [ "${1:-}" = --wipe ]; then rm -rf "$dir"; fi
}

status() {
  for name in $daemons; do runs "$name" && echo "$name runs" || echo "$name does not run"; done
  if runs slurmctld; then
    timeout 10 sinfo && timeout 10 squeue
  fi
}

case "${1:-}" in
  start | status) "$1" ;;
  stop) stop "${2:-}" ;;
  *) sed -n 's/^# \{0,1\}//; 2,12p' "$0"; [ "${1:-}" = --help ] ;;
esac
