/* The work of a lane per message, in C: the types Writer, Reader and Watch that ring.py describes and also has in
   Python, for where this file cannot be compiled. Same memory, same checks, same results; only here are the fences
   that let a writer leave out the wake-up of a reader that is awake.

   The order of accesses between the two processes, in terms of C11:
   - the payload is written before `head` (store, at least release) and read after it (load, acquire);
   - a reader about to sleep stores BELL_ASLEEP and then loads `head`; a writer stores `head` and then loads the bell.
     All four are sequentially consistent, so one of the two sees the other's store: no wake-up is lost. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

/* As in ring.py. */
enum { HEADER = 4096, FRAME_HEADER = 16, BUCKETS = 65 };
enum { W_HEAD = 16, W_SENT = 17, W_TAIL = 32, W_RECEIVED = 33, W_BELL = 48 };
enum { BELL_AWAKE = 0, BELL_ASLEEP = 1, BELL_ALWAYS = 2 };
#define PAD (1ULL << 32)
#define LENGTH (PAD - 1)
#define FIRST (1ULL << 33)
#define REST (1ULL << 34)

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* Add to an eventfd. False with an exception set. */
static bool ring_eventfd(int fd, uint64_t count, PyObject *corrupt, const char *what)
{
    while (write(fd, &count, sizeof count) < 0) {
        if (errno == EINTR)
            continue;
        if (errno == EAGAIN)
            PyErr_Format(corrupt, "the %s counter was driven to its limit", what);
        else
            PyErr_SetFromErrno(PyExc_OSError);
        return false;
    }
    return true;
}

/* ---------------------------------------------------------------- the part that both ends share */

#define END                                                                                                            \
    PyObject_HEAD Py_buffer map; /* the whole memory; map.obj NULL after close */                                      \
    uint64_t *words;             /* the same as u64 */                                                                 \
    uint64_t capacity, position;                                                                                       \
    int eventfd;        /* Writer: data, to wake the reader; Reader: credit */                                         \
    PyObject *corrupt /* the exception class LaneCorrupt */

typedef struct {
    END;
    uint64_t free_until; /* the position up to which the reader is known to have made room */
    uint64_t published, sent;
    char busy; /* a large message is under way: `send` refuses */
} Writer;

typedef struct {
    END;
    uint64_t limit; /* what the last look saw of `head` */
    uint64_t credit, received, sent_ns, received_ns;
    uint64_t wait_ns, histogram[BUCKETS]; /* of the time between sending and receiving */
    char joining;    /* the next frame belongs to a message that came in part */
    PyObject *bytes; /* memoryview of the whole memory */
    PyObject *join;  /* join(flags, view) takes a frame while `joining`, and each fragment */
} Reader;

typedef struct {
    END;
} End;

static bool end_init(End *self, PyObject *memory, int eventfd, PyObject *corrupt)
{
    if (self->map.obj) {
        PyErr_SetString(PyExc_TypeError, "made already");
        return false;
    }
    if (PyObject_GetBuffer(memory, &self->map, PyBUF_WRITABLE) < 0)
        return false;
    self->capacity = (uint64_t)self->map.len - HEADER;
    if (self->map.len < HEADER + 4096 || self->capacity & (self->capacity - 1) || (uintptr_t)self->map.buf & 7) {
        PyBuffer_Release(&self->map);
        PyErr_SetString(PyExc_ValueError, "not the memory of a lane");
        return false;
    }
    self->words = self->map.buf;
    self->eventfd = eventfd;
    self->corrupt = Py_NewRef(corrupt);
    return true;
}

static bool end_open(End *self)
{
    if (self->map.obj)
        return true;
    PyErr_SetString(PyExc_ValueError, "closed");
    return false;
}

/* ---------------------------------------------------------------- Writer */

static int writer_init(Writer *self, PyObject *args, PyObject *kwargs)
{
    PyObject *memory, *corrupt;
    int eventfd;
    if (!PyArg_ParseTuple(args, "OiO", &memory, &eventfd, &corrupt) || !end_init((End *)self, memory, eventfd, corrupt))
        return -1;
    self->free_until = self->capacity;
    return 0;
}

/* Copy one frame in, after padding where the ring ends. False: there is no known room, nothing happened. */
static bool put(Writer *self, const char *payload, uint64_t size, uint64_t flags)
{
    uint64_t offset = self->position & (self->capacity - 1);
    uint64_t need = (size + FRAME_HEADER + 7) & ~7ULL;
    uint64_t pad = need > self->capacity - offset ? self->capacity - offset : 0;
    if (need > self->capacity >> 2 || self->position + pad + need > self->free_until)
        return false;
    if (pad) {
        self->words[(HEADER + offset) >> 3] = PAD;
        offset = 0;
    }
    uint64_t *frame = self->words + ((HEADER + offset) >> 3);
    memcpy(frame + 2, payload, size);
    frame[0] = size | flags;
    frame[1] = now_ns();
    self->position += pad + need;
    self->sent++;
    return true;
}

/* Show the reader all that was put, and wake it if it may sleep. False with an exception set. */
static bool publish(Writer *self)
{
    if (self->published == self->position)
        return true;
    self->published = self->position;
    __atomic_store_n(self->words + W_SENT, self->sent, __ATOMIC_RELAXED);
    __atomic_store_n(self->words + W_HEAD, self->position, __ATOMIC_SEQ_CST);
    uint64_t bell = __atomic_load_n(self->words + W_BELL, __ATOMIC_SEQ_CST);
    if (bell == BELL_AWAKE)
        return true;
    if (bell == BELL_ASLEEP && __atomic_exchange_n(self->words + W_BELL, BELL_AWAKE, __ATOMIC_SEQ_CST) == BELL_AWAKE)
        return true;
    return ring_eventfd(self->eventfd, 1, self->corrupt, "data");
}

/* put or, if `show`, put and publish: what both methods do with their payload. */
static PyObject *put_object(Writer *self, PyObject *payload, uint64_t flags, bool show)
{
    bool done;
    if (!end_open((End *)self))
        return NULL;
    if (PyBytes_CheckExact(payload)) {
        done = put(self, PyBytes_AS_STRING(payload), (uint64_t)PyBytes_GET_SIZE(payload), flags);
    } else {
        Py_buffer view;
        if (PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE) < 0)
            return NULL;
        done = put(self, view.buf, (uint64_t)view.len, flags);
        PyBuffer_Release(&view);
    }
    if (done && show && !publish(self))
        return NULL;
    return PyBool_FromLong(done);
}

static PyObject *writer_send(Writer *self, PyObject *payload)
{
    if (self->busy)
        Py_RETURN_FALSE;
    return put_object(self, payload, 0, true);
}

static PyObject *writer_put(Writer *self, PyObject *args)
{
    PyObject *payload;
    unsigned long long flags;
    if (!PyArg_ParseTuple(args, "OK", &payload, &flags))
        return NULL;
    return put_object(self, payload, flags, false);
}

static PyObject *writer_publish(Writer *self, PyObject *none)
{
    if (!end_open((End *)self) || !publish(self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *writer_close(Writer *self, PyObject *none)
{
    if (self->map.obj)
        PyBuffer_Release(&self->map);
    Py_RETURN_NONE;
}

static void writer_dealloc(Writer *self)
{
    if (self->map.obj)
        PyBuffer_Release(&self->map);
    Py_XDECREF(self->corrupt);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef writer_methods[] = {
    {"send", (PyCFunction)writer_send, METH_O, NULL},
    {"put", (PyCFunction)writer_put, METH_VARARGS, NULL},
    {"publish", (PyCFunction)writer_publish, METH_NOARGS, NULL},
    {"close", (PyCFunction)writer_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef writer_members[] = {
    {"position", T_ULONGLONG, offsetof(Writer, position), READONLY, NULL},
    {"free_until", T_ULONGLONG, offsetof(Writer, free_until), 0, NULL},
    {"busy", T_BOOL, offsetof(Writer, busy), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject writer_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ring.Writer",
    .tp_basicsize = sizeof(Writer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)writer_init,
    .tp_dealloc = (destructor)writer_dealloc,
    .tp_methods = writer_methods,
    .tp_members = writer_members,
};

/* ---------------------------------------------------------------- Reader */

static int reader_init(Reader *self, PyObject *args, PyObject *kwargs)
{
    PyObject *memory, *join, *corrupt;
    int eventfd;
    if (!PyArg_ParseTuple(args, "OiOO", &memory, &eventfd, &join, &corrupt) ||
        !end_init((End *)self, memory, eventfd, corrupt))
        return -1;
    self->join = Py_NewRef(join);
    self->bytes = PyMemoryView_FromObject(memory);
    return self->bytes ? 0 : -1;
}

static uint64_t load_head(Reader *self)
{
    return __atomic_load_n(self->words + W_HEAD, __ATOMIC_ACQUIRE);
}

static void *broken(Reader *self, const char *what)
{
    PyErr_SetString(self->corrupt, what);
    return NULL;
}

/* See what was published. False with an exception set. */
static bool look(Reader *self)
{
    self->limit = load_head(self);
    if (self->limit - self->position > self->capacity || self->limit & 7)
        return broken(self, "more published than fits");
    return true;
}

static bool give_credit(Reader *self)
{
    uint64_t credit = self->credit;
    self->credit = 0;
    return ring_eventfd(self->eventfd, credit, self->corrupt, "credit");
}

/* Note how long the message waited that is handed out now. */
static void count(Reader *self)
{
    uint64_t now = now_ns(), waited = now > self->sent_ns ? now - self->sent_ns : 0;
    self->received_ns = now;
    self->wait_ns += waited;
    self->histogram[waited ? 64 - __builtin_clzll(waited) : 0]++;
}

/* The payload of the frame at `position`, which is taken; NULL with an exception set. */
static PyObject *take(Reader *self, uint64_t *flags)
{
    uint64_t offset = self->position & (self->capacity - 1);
    uint64_t word = self->words[(HEADER + offset) >> 3];
    if (word == PAD) {
        uint64_t pad = self->capacity - offset;
        if (!offset || self->limit - self->position <= pad)
            return broken(self, "padding out of place");
        self->position += pad;
        self->credit += pad;
        offset = 0;
        word = self->words[HEADER >> 3];
    }
    uint64_t size = word & LENGTH, need = (size + FRAME_HEADER + 7) & ~7ULL;
    *flags = word - size;
    if (need > self->capacity - offset || need > self->limit - self->position ||
        (*flags && *flags != FIRST && *flags != REST))
        return broken(self, "frame out of range");
    Py_ssize_t start = (Py_ssize_t)(HEADER + offset + FRAME_HEADER);
    PyObject *view = PySequence_GetSlice(self->bytes, start, start + (Py_ssize_t)size);
    if (!view)
        return NULL;
    self->position += need;
    self->credit += need;
    self->received++;
    self->sent_ns = self->words[((HEADER + offset) >> 3) + 1];
    __atomic_store_n(self->words + W_TAIL, self->position, __ATOMIC_RELAXED);
    __atomic_store_n(self->words + W_RECEIVED, self->received, __ATOMIC_RELAXED);
    return view;
}

static PyObject *reader_next(Reader *self, PyObject *none)
{
    uint64_t flags;
    if (!end_open((End *)self))
        return NULL;
    for (;;) {
        if (self->credit >= self->capacity >> 2 && !give_credit(self))
            return NULL;
        if (self->position == self->limit) {
            if (!look(self))
                return NULL;
            if (self->position == self->limit)
                Py_RETURN_NONE;
        }
        PyObject *view = take(self, &flags);
        if (!view)
            return NULL;
        if (!flags && !self->joining) {
            count(self);
            return view;
        }
        PyObject *message = PyObject_CallFunction(self->join, "KN", (unsigned long long)flags, view);
        if (message != Py_None) {
            if (message)
                count(self);
            return message;
        }
        Py_DECREF(message);
    }
}

static PyObject *reader_refresh(Reader *self, PyObject *none)
{
    if (!end_open((End *)self) || !look(self))
        return NULL;
    return PyBool_FromLong(self->limit != self->position);
}

static PyObject *reader_drained(Reader *self, void *closure)
{
    return PyBool_FromLong(self->position == self->limit && self->credit < self->capacity >> 2);
}

/* What a closed reader looks at, should a Watch still know it. */
static uint64_t nowhere[HEADER / 8];

static PyObject *reader_waits(Reader *self, PyObject *none)
{
    PyObject *counts = PyTuple_New(BUCKETS);
    for (Py_ssize_t i = 0; counts && i < BUCKETS; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(self->histogram[i]);
        if (!number)
            Py_CLEAR(counts);
        else
            PyTuple_SET_ITEM(counts, i, number);
    }
    return counts ? Py_BuildValue("KN", (unsigned long long)self->wait_ns, counts) : NULL;
}

static PyObject *reader_close(Reader *self, PyObject *none)
{
    self->words = nowhere;
    self->position = self->limit = 0;
    if (self->map.obj)
        PyBuffer_Release(&self->map);
    Py_CLEAR(self->bytes);
    Py_CLEAR(self->join);
    Py_RETURN_NONE;
}

static int reader_traverse(Reader *self, visitproc visit, void *arg)
{
    Py_VISIT(self->join);
    Py_VISIT(self->bytes);
    return 0;
}

static int reader_clear(Reader *self)
{
    Py_CLEAR(self->join);
    Py_CLEAR(self->bytes);
    return 0;
}

static void reader_dealloc(Reader *self)
{
    PyObject_GC_UnTrack(self);
    if (self->map.obj)
        PyBuffer_Release(&self->map);
    Py_XDECREF(self->bytes);
    Py_XDECREF(self->join);
    Py_XDECREF(self->corrupt);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef reader_methods[] = {
    {"next", (PyCFunction)reader_next, METH_NOARGS, NULL},
    {"refresh", (PyCFunction)reader_refresh, METH_NOARGS, NULL},
    {"waits", (PyCFunction)reader_waits, METH_NOARGS, NULL},
    {"close", (PyCFunction)reader_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef reader_members[] = {
    {"sent_ns", T_ULONGLONG, offsetof(Reader, sent_ns), READONLY, NULL},
    {"received_ns", T_ULONGLONG, offsetof(Reader, received_ns), READONLY, NULL},
    {"joining", T_BOOL, offsetof(Reader, joining), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef reader_getset[] = {
    {"drained", (getter)reader_drained, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject reader_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ring.Reader",
    .tp_basicsize = sizeof(Reader),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)reader_init,
    .tp_traverse = (traverseproc)reader_traverse,
    .tp_clear = (inquiry)reader_clear,
    .tp_dealloc = (destructor)reader_dealloc,
    .tp_methods = reader_methods,
    .tp_members = reader_members,
    .tp_getset = reader_getset,
};

/* ---------------------------------------------------------------- Watch */

enum { EVENTS = 64 };

typedef struct {
    Reader *reader;
    int data; /* its eventfd */
    PyObject *owner;
} Watched;

typedef struct {
    PyObject_HEAD Watched *of; /* an array of `count` */
    Py_ssize_t count;
    int epoll;
    PyObject *others; /* NULL or a list: descriptors that were ready beside the readers' data */
} Watch;

static int watch_init(Watch *self, PyObject *args, PyObject *kwargs)
{
    PyObject *epoll;
    return PyArg_ParseTuple(args, "O", &epoll) && (self->epoll = PyObject_AsFileDescriptor(epoll)) >= 0 ? 0 : -1;
}

static bool has_news(Reader *reader)
{
    return __atomic_load_n(reader->words + W_HEAD, __ATOMIC_ACQUIRE) != reader->position;
}

static uint64_t *bell_of(Reader *reader)
{
    return reader->words + W_BELL;
}

static PyObject *watch_add(Watch *self, PyObject *args)
{
    PyObject *reader, *owner;
    int data;
    if (!PyArg_ParseTuple(args, "O!iO", &reader_type, &reader, &data, &owner) || !end_open((End *)reader))
        return NULL;
    Watched *more = PyMem_Realloc(self->of, (size_t)(self->count + 1) * sizeof *more);
    if (!more)
        return PyErr_NoMemory();
    self->of = more;
    more[self->count].reader = (Reader *)Py_NewRef(reader);
    more[self->count].data = data;
    more[self->count++].owner = Py_NewRef(owner);
    __atomic_store_n(bell_of((Reader *)reader), BELL_AWAKE, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyObject *watch_remove(Watch *self, PyObject *reader)
{
    for (Py_ssize_t i = 0; i < self->count; i++) {
        Watched gone = self->of[i];
        if ((PyObject *)gone.reader != reader)
            continue;
        memmove(self->of + i, self->of + i + 1, (size_t)(--self->count - i) * sizeof *self->of);
        Py_DECREF(gone.reader);
        Py_DECREF(gone.owner);
        break;
    }
    Py_RETURN_NONE;
}

static PyObject *watch_news(Watch *self, PyObject *none)
{
    PyObject *found = NULL;
    for (Py_ssize_t i = 0; i < self->count; i++) {
        if (!has_news(self->of[i].reader))
            continue;
        if (!found && !(found = PyList_New(0)))
            return NULL;
        if (PyList_Append(found, self->of[i].owner) < 0) {
            Py_DECREF(found);
            return NULL;
        }
    }
    return found ? found : Py_NewRef(Py_None);
}

static bool any_news(Watch *self)
{
    for (Py_ssize_t i = 0; i < self->count; i++)
        if (has_news(self->of[i].reader))
            return true;
    return false;
}

static PyObject *watch_sleep(Watch *self, PyObject *none)
{
    for (Py_ssize_t i = 0; i < self->count; i++)
        __atomic_store_n(bell_of(self->of[i].reader), BELL_ASLEEP, __ATOMIC_SEQ_CST);
    for (Py_ssize_t i = 0; i < self->count; i++) {
        Reader *reader = self->of[i].reader;
        if (__atomic_load_n(reader->words + W_HEAD, __ATOMIC_SEQ_CST) != reader->position)
            Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

static bool wake(Watch *self)
{
    bool rung = false;
    for (Py_ssize_t i = 0; i < self->count; i++)
        rung |= __atomic_exchange_n(bell_of(self->of[i].reader), BELL_AWAKE, __ATOMIC_SEQ_CST) != BELL_ASLEEP;
    return rung;
}

static PyObject *watch_wake(Watch *self, PyObject *none)
{
    return PyBool_FromLong(wake(self));
}

static bool is_data(Watch *self, int fd)
{
    for (Py_ssize_t i = 0; i < self->count; i++)
        if (self->of[i].data == fd)
            return true;
    return false;
}

static PyObject *watch_wait(Watch *self, PyObject *argument)
{
    struct epoll_event events[EVENTS];
    int count, milliseconds = (int)PyLong_AsLong(argument);
    bool interrupted;
    if (milliseconds == -1 && PyErr_Occurred())
        return NULL;
    do {
        if (milliseconds) {
            Py_BEGIN_ALLOW_THREADS
            count = epoll_wait(self->epoll, events, EVENTS, milliseconds);
            Py_END_ALLOW_THREADS
        } else {
            count = epoll_wait(self->epoll, events, EVENTS, 0);
        }
        interrupted = count < 0 && errno == EINTR; /* handlers of signals may change errno */
        if (interrupted && PyErr_CheckSignals() < 0)
            return NULL;
    } while (interrupted && milliseconds < 0);
    if (count < 0 && !interrupted)
        return PyErr_SetFromErrno(PyExc_OSError);
    wake(self);
    Py_CLEAR(self->others);
    for (int i = 0; i < count; i++) {
        if (is_data(self, events[i].data.fd))
            continue;
        PyObject *number = PyLong_FromLong(events[i].data.fd);
        if (!number || (!self->others && !(self->others = PyList_New(0))) || PyList_Append(self->others, number) < 0) {
            Py_XDECREF(number);
            return NULL;
        }
        Py_DECREF(number);
    }
    return watch_news(self, NULL);
}

static PyObject *watch_spin(Watch *self, PyObject *args)
{
    unsigned long long longest, disturbed;
    bool undisturbed = true, found = false;
    if (!PyArg_ParseTuple(args, "KK", &longest, &disturbed))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    uint64_t before = now_ns(), deadline = before + longest;
    while (!(found = any_news(self))) {
        uint64_t now = now_ns();
        if (now - before > disturbed)
            undisturbed = false;
        if (now >= deadline)
            break;
        before = now;
    }
    Py_END_ALLOW_THREADS
    if (!found)
        Py_RETURN_NONE;
    return PyBool_FromLong(undisturbed);
}

static int watch_traverse(Watch *self, visitproc visit, void *arg)
{
    for (Py_ssize_t i = 0; i < self->count; i++) {
        Py_VISIT(self->of[i].reader);
        Py_VISIT(self->of[i].owner);
    }
    return 0;
}

static int watch_clear(Watch *self)
{
    Py_CLEAR(self->others);
    while (self->count) {
        Watched gone = self->of[--self->count];
        Py_DECREF(gone.reader);
        Py_DECREF(gone.owner);
    }
    return 0;
}

static void watch_dealloc(Watch *self)
{
    PyObject_GC_UnTrack(self);
    watch_clear(self);
    PyMem_Free(self->of);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef watch_methods[] = {
    {"add", (PyCFunction)watch_add, METH_VARARGS, NULL},
    {"remove", (PyCFunction)watch_remove, METH_O, NULL},
    {"news", (PyCFunction)watch_news, METH_NOARGS, NULL},
    {"sleep", (PyCFunction)watch_sleep, METH_NOARGS, NULL},
    {"wake", (PyCFunction)watch_wake, METH_NOARGS, NULL},
    {"wait", (PyCFunction)watch_wait, METH_O, NULL},
    {"spin", (PyCFunction)watch_spin, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyObject *watch_rings_always(Watch *self, void *closure)
{
    Py_RETURN_FALSE;
}

static PyMemberDef watch_members[] = {
    {"others", T_OBJECT, offsetof(Watch, others), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef watch_getset[] = {
    {"rings_always", (getter)watch_rings_always, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject watch_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ring.Watch",
    .tp_basicsize = sizeof(Watch),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)watch_init,
    .tp_traverse = (traverseproc)watch_traverse,
    .tp_clear = (inquiry)watch_clear,
    .tp_dealloc = (destructor)watch_dealloc,
    .tp_methods = watch_methods,
    .tp_members = watch_members,
    .tp_getset = watch_getset,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "ring", .m_size = -1};

PyMODINIT_FUNC PyInit_ring(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddType(made, &writer_type) < 0 || PyModule_AddType(made, &reader_type) < 0 ||
                 PyModule_AddType(made, &watch_type) < 0))
        Py_CLEAR(made);
    return made;
}
