# cython: language_level=3, cdivision=False
"""The native gate (`core.h`) for Python. All methods belong to the thread that runs pyfuse3."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

import errno as _errno
import os
from array import array


cdef extern from "<sys/stat.h>" nogil:
    struct timespec:
        int64_t tv_sec
        long tv_nsec

    struct stat:
        uint32_t st_mode
        uint64_t st_nlink
        uint32_t st_uid
        uint32_t st_gid
        uint64_t st_rdev
        int64_t st_size
        int64_t st_blksize
        int64_t st_blocks
        timespec st_atim
        timespec st_mtim
        timespec st_ctim


cdef extern from "core.h":
    int OPCODES, BUCKETS
    int NAME_ASK, NAME_PLAIN, NAME_PLAIN_DIRECTORY, NAME_GONE

    enum verdict:
        ANSWERED
        PASSED
        CARRIED

    struct map:
        size_t used

    struct name:
        uint64_t real
        uint32_t text
        uint8_t length
        uint8_t kind
        uint8_t first

    struct directory:
        uint64_t id
        name *names
        char *text
        uint32_t count
        uint32_t known
        bint let_go

    struct known:
        directory *directory
        uint64_t id, lookups
        uint32_t name

    struct facts:
        map known
        map claimed
        map directories
        size_t bytes
        size_t names

    struct files:
        uint32_t open

    struct lent:
        bint used

    struct told:
        stat attributes
        bint has_attributes
        bint no_capability

    struct gate:
        facts facts
        map told
        map lent
        files files
        map asked
        int device
        int statfs
        int loop
        bint xattrs
        bint carries
        bint hooked
        bint keeps_listings
        bint holds_writes
        bint openless
        bint opendirless
        uint32_t stack_depth
        bint passes_lowers
        map backed
        uint64_t bytes_read
        uint64_t bytes_written
        uint64_t init_flags
        uint64_t extra_init_flags
        uint64_t natively[64]
        uint64_t passed[64]
        uint32_t took[64][24]
        void (*let_go)(uint64_t) noexcept
        uint64_t (*open_directory)(uint64_t) noexcept
        void (*release_directory)(uint64_t) noexcept
        void (*carry)(const void *, size_t) noexcept nogil

    void *map_get(const map *, uint64_t) nogil
    bint map_has(const map *, uint64_t) nogil
    bint map_put(map *, uint64_t, void *) nogil
    void *map_take(map *, uint64_t) nogil
    directory *facts_prepare(facts *, uint64_t, uint32_t, uint32_t) nogil
    bint facts_home(directory *, int, const char *, size_t, uint64_t) nogil
    bint facts_name(facts *, directory *, const char *, size_t, uint8_t, uint16_t, uint64_t) nogil
    bint facts_publish(facts *, directory *) nogil
    void facts_discard(facts *, directory *) nogil
    void facts_forget(facts *, uint64_t) nogil
    directory *facts_directory(const facts *, uint64_t) nogil
    int64_t facts_find(const facts *, const directory *, const char *, size_t) nogil
    uint64_t facts_offset(const directory *, uint32_t) nogil
    bint facts_retract(facts *, directory *, const char *, size_t) nogil
    void facts_vanish(const facts *, directory *, const char *, size_t) nogil
    void facts_give_back(directory *, uint32_t, uint8_t) nogil
    known *facts_known(const facts *, const directory *, uint32_t) nogil
    known *facts_know(facts *, directory *, uint32_t) nogil
    int files_switch(files *, uint64_t, int) nogil
    bint gate_init(gate *, uint32_t, uint64_t) nogil
    void gate_free(gate *) nogil
    bint gate_lists_now(const gate *, uint64_t) nogil
    void gate_unlist(gate *, uint64_t) nogil
    verdict gate_answer(gate *, void *, size_t *) nogil
    bint gate_list(gate *, uint64_t, uint64_t, uint64_t, uint32_t *, uint32_t, bint) nogil
    told *gate_tell(gate *, uint64_t) nogil
    void gate_untell(gate *, uint64_t) nogil
    bint gate_lend(gate *, uint64_t, int, bint) nogil
    void gate_take_back(gate *, uint64_t) nogil
    uint64_t gate_adopt(gate *, directory *, uint32_t) nogil
    int32_t backing_open(gate *, uint64_t, int, bint) nogil
    void backing_close(gate *, uint64_t) nogil
    void workers_settle() nogil
    int gate_reply(int, uint64_t, int, const void *, size_t) nogil
    int gate_prune(int, const uint64_t *, uint32_t) nogil
    bint hook_serve(const char *) nogil
    void hook_arm(gate *) nogil
    void hook_replied(gate *) nogil
    void hook_look(const gate *) nogil
    ssize_t hook_receive(gate *, int, void *, size_t) nogil


#: Nodes in one notification.
PRUNED_AT_ONCE = 4096
#: What INIT asks for beside libfuse's own flags (linux/fuse.h).
CACHE_SYMLINKS = 1 << 23
DONT_MASK = 1 << 6
HANDLE_KILLPRIV_V2 = 1 << 28
SETXATTR_EXT = 1 << 29
PASSTHROUGH = 1 << 37
ALLOW_IDMAP = 1 << 40

def serve(library: bytes):
    """Says whose calls of libfuse come through this module from now on: the shared object at that path. Raises
    OSError when it is not loaded."""
    if not hook_serve(library):
        raise OSError(_errno.ENOENT, os.strerror(_errno.ENOENT), os.fsdecode(library))


#: One mount a process: libfuse's session is one as well.
cdef gate _gate
cdef object _live = None


cdef public ssize_t hook_receive_unlocked(gate *which, int device, void *buffer, size_t size) noexcept with gil:
    cdef ssize_t got
    with nogil:
        got = hook_receive(which, device, buffer, size)
    return got


cdef void _carry(const void *frame, size_t size) noexcept with gil:
    try:
        _live.on_carry((<const unsigned char *>frame)[:size])
    except BaseException:  # the event loop is ending: nobody will answer
        gate_reply(_gate.device, (<const uint64_t *>frame)[1], _errno.EIO, NULL, 0)


cdef int64_t _find(uint64_t id, bytes name, directory **found) noexcept:
    """Position of a name in its directory, which becomes `found`; -1: not published, or no such name."""
    found[0] = facts_directory(&_gate.facts, id)
    return -1 if found[0] == NULL else facts_find(&_gate.facts, found[0], name, len(name))


cdef _split(ns, timespec *into):
    # As Python's integers: nanoseconds of far years have more than 64 bits.
    seconds, left = divmod(ns, 1000000000)
    into.tv_sec = seconds
    into.tv_nsec = left


cdef void _let_go(uint64_t id) noexcept with gil:
    _call(_live.on_let_go, id)


cdef uint64_t _open_directory(uint64_t id) noexcept with gil:
    return _call(_live.on_opendir, id) or 0


cdef void _release_directory(uint64_t handle) noexcept with gil:
    _call(_live.on_releasedir, handle)


cdef object _call(callback, uint64_t what):
    """None where that fails, which is our bug; for the log."""
    try:
        return callback(what)
    except BaseException as error:
        import logging

        logging.getLogger("layerfs.gate").exception("%r of %d failed: %r", callback, what, error)


cdef class NativeGate:
    """Implements `layerfs.gate.Gate`. Raises MemoryError when there is none for it."""

    #: called with a directory's node id that may be released now (`holds` was true before)
    cdef public object on_let_go
    #: called with the node id of a directory that is opened: its handle, or 0 where that has to wait for something
    cdef public object on_opendir
    #: called with the handle of a directory that was released
    cdef public object on_releasedir
    #: called with a frame that pyfuse3 cannot carry; answered by `reply`
    cdef public object on_carry

    def __init__(self, descriptors: int, resolve: int, *, statfs: int = -1, xattrs: bool = True,
                 read_only: bool = False, openless: bool = False):
        """`descriptors`: how many may be used for open files, and a quarter as many for directories. `resolve`:
        flags of openat2 for paths in a layer. `statfs`: descriptor of the file system whose space is shown.
        `read_only`: no name ever changes. `openless`: the kernel opens and closes files without asking."""
        global _live
        if _live is not None:
            raise RuntimeError("one gate a process")
        if not gate_init(&_gate, descriptors, resolve):
            raise MemoryError
        _gate.statfs = statfs
        _gate.xattrs = xattrs
        _gate.keeps_listings = read_only
        _gate.openless = openless
        _gate.opendirless = openless and read_only
        _gate.let_go = _let_go
        _gate.open_directory = _open_directory
        _gate.release_directory = _release_directory
        _gate.carry = _carry
        _gate.extra_init_flags = CACHE_SYMLINKS | DONT_MASK | HANDLE_KILLPRIV_V2 | SETXATTR_EXT
        _live = self

    #: somebody answers from what is published
    native = True

    # -- life -------------------------------------------------------------------------------------

    def arm(self):
        """The next mount goes through here."""
        hook_arm(&_gate)

    @property
    def hooked(self):
        """Whether the mount does."""
        return bool(_gate.hooked)

    def mind(self, loop: int):
        """`loop`: a descriptor that is readable when the event loop has something to do."""
        _gate.loop = loop

    def look(self):
        """The event loop is about to sleep."""
        with nogil:
            hook_look(&_gate)

    def pass_through(self, stack_depth: int):
        """The kernel reads and writes files itself, where it may. `stack_depth`: one more than that of the
        file systems they lie on (fuse_init_out.max_stack_depth)."""
        _gate.stack_depth = stack_depth
        _gate.passes_lowers = _gate.keeps_listings
        _gate.extra_init_flags |= PASSTHROUGH

    def allow_idmapped(self):
        """The kernel may make idmapped mounts of the mount, which is one with default_permissions. It then
        names the caller to requests that create alone."""
        _gate.extra_init_flags |= ALLOW_IDMAP

    def carries(self, bint does):
        """Whether `on_carry` takes frames; else they are answered by ENOSYS."""
        _gate.carries = does

    def close(self):
        """After the mount. Replies of threads that still read go nowhere."""
        if _gate.device >= 0:
            nowhere = os.memfd_create("layerfs-ended")
            os.dup2(nowhere, _gate.device, inheritable=False)
            os.close(nowhere)

    def reply(self, unique: int, error: int, payload=b""):
        """To a carried request; whoever asked may be gone. `payload`: any buffer of bytes."""
        cdef const unsigned char[:] view = payload
        cdef const void *data = &view[0] if len(payload) else NULL
        gate_reply(_gate.device, unique, error, data, len(payload))
        hook_replied(&_gate)

    def again(self, frame):
        """Whether a frame that was carried is answered here by now."""
        cdef bytearray copy = bytearray(frame)
        cdef unsigned char *data = copy
        cdef size_t size = len(copy)
        return gate_answer(&_gate, data, &size) == ANSWERED

    # -- facts ------------------------------------------------------------------------------------

    def publish_directory(self, uint64_t id, names, plain):
        """`names`: name -> entry with `home`, `real`, `is_dir`, `lowers`, `node`; `plain`: home -> (descriptor of its
        layer's root, path, what makes real inode numbers shown ones)."""
        cdef directory *made
        cdef uint16_t home
        cdef uint8_t kind
        cdef uint64_t real
        cdef dict numbers = {}
        if len(plain) > 65000:
            return
        made = facts_prepare(&_gate.facts, id, len(names), len(plain))
        if made == NULL:
            return
        for each, (root, path, base) in plain.items():
            numbers[each] = len(numbers)
            if not facts_home(made, root, path, len(path), base):
                facts_discard(&_gate.facts, made)
                return
        for name, entry in names.items():
            kind = NAME_ASK
            home = 0
            real = 0
            if entry.node is None and not (entry.is_dir and len(entry.lowers) > 1):
                number = numbers.get(entry.home)
                if number is not None:
                    kind = NAME_PLAIN_DIRECTORY if entry.is_dir else NAME_PLAIN
                    home = number
                    real = entry.real
            if not facts_name(&_gate.facts, made, name, len(name), kind, home, real):
                facts_discard(&_gate.facts, made)
                return
        facts_publish(&_gate.facts, made)

    def unpublish_directory(self, uint64_t id):
        if _gate.opendirless:
            gate_unlist(&_gate, id)
        self._forget_directory(id)

    def retract_name(self, uint64_t id, bytes name):
        cdef directory *found = facts_directory(&_gate.facts, id)
        if found != NULL and not facts_retract(&_gate.facts, found, name, len(name)):
            self._forget_directory(id)

    def vanish_name(self, uint64_t id, bytes name):
        cdef directory *found = facts_directory(&_gate.facts, id)
        if found != NULL:
            facts_vanish(&_gate.facts, found, name, len(name))

    def tell_attributes(self, uint64_t id, shown):
        """`shown`: as `vfs.tree.Attributes`."""
        cdef told *entry = gate_tell(&_gate, id)
        cdef stat *to
        if entry == NULL:
            return
        st = shown.st
        to = &entry.attributes
        to.st_mode = st.st_mode
        to.st_nlink = shown.nlink
        to.st_uid = shown.uid
        to.st_gid = shown.gid
        to.st_rdev = st.st_rdev
        to.st_size = st.st_size
        to.st_blksize = st.st_blksize
        to.st_blocks = shown.blocks
        _split(st.st_atime_ns, &to.st_atim)
        _split(st.st_mtime_ns, &to.st_mtim)
        _split(shown.ctime_ns, &to.st_ctim)
        entry.has_attributes = True

    def retract_attributes(self, uint64_t id):
        cdef told *entry = <told *>map_get(&_gate.told, id)
        if entry != NULL:
            entry.has_attributes = False

    def tell_no_capability(self, uint64_t id):
        cdef told *entry = gate_tell(&_gate, id)
        if entry != NULL:
            entry.no_capability = True

    def retract_capability(self, uint64_t id):
        cdef told *entry = <told *>map_get(&_gate.told, id)
        if entry != NULL:
            entry.no_capability = False

    def claim(self, uint64_t id):
        """Python makes a node with this id."""
        if not map_put(&_gate.facts.claimed, id, NULL):
            raise MemoryError

    def forget(self, uint64_t id):
        """Python has no such node any more."""
        map_take(&_gate.facts.claimed, id)
        gate_untell(&_gate, id)
        self.unpublish_directory(id)

    cdef _forget_directory(self, uint64_t id):
        cdef directory *found = facts_directory(&_gate.facts, id)
        if found == NULL:
            return
        if found.known:
            raise AssertionError("a directory that is in use")
        facts_forget(&_gate.facts, id)

    # -- objects that the kernel has from here ----------------------------------------------------

    def knows(self, uint64_t id):
        return bool(map_has(&_gate.facts.known, id))

    def whereabouts(self, uint64_t id):
        """(node id of its directory, its name there), or None."""
        cdef known *found = <known *>map_get(&_gate.facts.known, id)
        cdef name *text
        if found == NULL:
            return None
        text = &found.directory.names[found.name]
        return found.directory.id, <bytes>found.directory.text[text.text:text.text + text.length]

    def holds(self, uint64_t id):
        """Whether the kernel has objects by names of this directory; if so `on_let_go` tells when it has not."""
        cdef directory *found = facts_directory(&_gate.facts, id)
        if found == NULL or found.known == 0:
            return False
        found.let_go = True
        return True

    def known_in(self, uint64_t id):
        """Node ids of those objects."""
        cdef directory *found = facts_directory(&_gate.facts, id)
        cdef known *object
        if found == NULL or found.known == 0:
            return []
        ids = []
        for position in range(found.count):
            object = facts_known(&_gate.facts, found, position)
            if object != NULL:
                ids.append(object.id)
        return ids

    def knows_in(self, uint64_t id):
        cdef directory *found = facts_directory(&_gate.facts, id)
        return found != NULL and found.known > 0

    def loaded(self):
        return _gate.facts.names

    def loaded_in(self, uint64_t id):
        cdef directory *found = facts_directory(&_gate.facts, id)
        return 0 if found == NULL else found.count

    def prune(self, nodes):
        """As `layerfs.gate.Gate`. May be called in a thread."""
        cdef const unsigned char[:] view
        cdef int error
        for start in range(0, len(nodes), PRUNED_AT_ONCE):
            ids = array("Q", nodes[start:start + PRUNED_AT_ONCE])
            view = memoryview(ids).cast("B")
            with nogil:
                error = gate_prune(_gate.device, <const uint64_t *>&view[0], <uint32_t>(view.shape[0] // 8))
            if error:
                raise OSError(-error, os.strerror(-error))

    def adopt(self, uint64_t id, bytes name):
        """Python makes a node of a name: the lookup count that it takes over, 0 when there is none."""
        cdef directory *found
        cdef int64_t position = _find(id, name, &found)
        return 0 if position < 0 else gate_adopt(&_gate, found, <uint32_t>position)

    def entrust(self, uint64_t id, bytes name, uint64_t lookups):
        cdef directory *found
        cdef int64_t position = _find(id, name, &found)
        cdef known *object
        if position < 0 or found.names[position].kind != NAME_PLAIN:
            return False
        object = facts_know(&_gate.facts, found, <uint32_t>position)
        if object == NULL:
            return False
        object.lookups += lookups
        return True

    def give_back(self, uint64_t id, bytes name, bint is_dir):
        """Python let go of the node of a name that is what it was when it was published."""
        cdef directory *found
        cdef int64_t position = _find(id, name, &found)
        if position >= 0:
            facts_give_back(found, <uint32_t>position, NAME_PLAIN_DIRECTORY if is_dir else NAME_PLAIN)

    def lend(self, uint64_t handle, int fd, bint writes):
        """Files that Python opened may be read here, and written."""
        if not gate_lend(&_gate, handle, fd, writes):
            gate_take_back(&_gate, handle)

    def take_back(self, uint64_t handle):
        gate_take_back(&_gate, handle)

    def was_used(self, uint64_t handle):
        """Whether a lent file was, since this was asked last."""
        cdef lent *entry = <lent *>map_get(&_gate.lent, handle)
        if entry == NULL or not entry.used:
            return False
        entry.used = False
        return True

    def open_backing(self, uint64_t handle, uint64_t id, int fd, bint allowed):
        """As `layerfs.gate.Gate`. Raises MemoryError."""
        cdef int32_t backing = backing_open(&_gate, id, fd, allowed)
        if backing < 0:
            raise MemoryError
        if backing and not map_put(&_gate.backed, handle, <void *><size_t>backing):
            backing_close(&_gate, id)
            raise MemoryError
        return backing

    def close_backing(self, uint64_t handle, uint64_t id):
        map_take(&_gate.backed, handle)
        backing_close(&_gate, id)

    def hold_writes(self, bint held):
        _gate.holds_writes = held

    def settle_writes(self):
        with nogil:
            workers_settle()

    def switch(self, uint64_t id, int fd):
        """Files of a node that were opened here read `fd` from now on. Raises OSError."""
        if files_switch(&_gate.files, id, fd) < 0:
            raise OSError(_errno.EMFILE, os.strerror(_errno.EMFILE))

    # -- listing ----------------------------------------------------------------------------------

    def list_names(self, uint64_t handle, uint64_t id, uint64_t parent, names, bint fresh):
        """As `layerfs.gate.Gate`; for order and offsets see `facts_offset`."""
        cdef directory *found = facts_directory(&_gate.facts, id)
        cdef uint32_t *order
        cdef int64_t position
        cdef uint32_t count = 0
        if found == NULL:
            return list(names), range(3, len(names) + 3)
        asked, plain = [], []
        for name in names:
            position = facts_find(&_gate.facts, found, name, len(name))
            if position < 0:
                return list(names), range(3, len(names) + 3)
            listed = (facts_offset(found, <uint32_t>position), position, name)
            (asked if found.names[position].first else plain).append(listed)
        arranged = asked + plain  # mostly in order: then sorting is one look
        arranged.sort()
        order = <uint32_t *>malloc((len(arranged) + 1) * sizeof(uint32_t))
        if order != NULL:
            for _, place, _ in arranged:
                order[count] = place
                count += 1
            if not gate_list(&_gate, handle, id, parent, order, count, fresh):
                free(order)
        return [name for _, _, name in arranged], [offset for offset, _, _ in arranged]

    def lists_now(self, uint64_t handle):
        """Whether what `handle` lists is what is there now; true when it lists nothing here."""
        return bool(gate_lists_now(&_gate, handle))

    def answers(self, uint64_t id, bytes name):
        """Whether the gate would answer for a name."""
        cdef directory *found
        cdef int64_t position = _find(id, name, &found)
        return position >= 0 and found.names[position].kind in (NAME_PLAIN, NAME_PLAIN_DIRECTORY)

    # -- looking in -------------------------------------------------------------------------------

    def counters(self):
        """As `layerfs.gate.Gate`."""
        counts = {"entries": _gate.facts.names, "known": _gate.facts.known.used, "bytes": _gate.facts.bytes,
                  "read": _gate.bytes_read, "written": _gate.bytes_written}
        for opcode in range(64):
            name = OPCODE_NAMES.get(opcode, f"opcode{opcode}")
            if _gate.natively[opcode]:
                counts[f"native.{name}"] = _gate.natively[opcode]
                for bucket in range(BUCKETS):
                    if _gate.took[opcode][bucket]:
                        counts[f"latency.{name}.{bucket}"] = _gate.took[opcode][bucket]
            if _gate.passed[opcode]:
                counts[f"passed.{name}"] = _gate.passed[opcode]
        return counts


#: linux/fuse.h, enum fuse_opcode.
OPCODE_NAMES = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 5: "readlink", 6: "symlink", 8: "mknod", 9: "mkdir",
    10: "unlink", 11: "rmdir", 12: "rename", 13: "link", 14: "open", 15: "read", 16: "write", 17: "statfs",
    18: "release", 20: "fsync", 21: "setxattr", 22: "getxattr", 23: "listxattr", 24: "removexattr", 25: "flush",
    26: "init", 27: "opendir", 28: "readdir", 29: "releasedir", 30: "fsyncdir", 31: "getlk", 32: "setlk",
    33: "setlkw", 34: "access", 35: "create", 36: "interrupt", 37: "bmap", 38: "destroy", 39: "ioctl", 40: "poll",
    41: "notify_reply", 42: "batch_forget", 43: "fallocate", 44: "readdirplus", 45: "rename2", 46: "lseek",
    47: "copy_file_range", 48: "setupmapping", 49: "removemapping", 50: "syncfs", 51: "tmpfile", 52: "statx",
    53: "copy_file_range_64",
}
