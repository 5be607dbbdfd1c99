"""Every message that crosses a lane, and nothing else: the engine's vocabulary.

One msgspec Struct each: positional (array_like), frozen, not tracked by the garbage collector, with an integer tag
that is never reused; new fields go last with a default. Token arrays are `memoryview`s of raw little-endian int32,
request ids of int64. A decoded memoryview aliases the ring: whoever keeps it beyond the handler copies it.
No dicts, no pickle, no Any. Each is defined in the file of who speaks to whom, and had from here; each actor's inbox
is one of the unions at the end.

    front  --Generate, Cancel-->  text  --Submit, Abort-->  sched  --SlotParams-->  sampler.r
    front  <--Chunks, Refused, Stats--  text  <--Tokens, PromptLogprobs, Pooled, Ended, Stats--  sched
                                                            sched  --Plan, Instruct-->  exec.r
                                                            sched  <--ExecutorReady, StepOut, Carried--  exec.0
                         sched  --LoadGrammar, DropGrammar, GrammarStates, SlotMasks-->  sampler.r
                                text  --ImagePixels-->  sched  --ImagePixels, DropImage-->  exec.r
    front  --Tokenize, Detokenize, Order, Look, AskTimelines-->  text  --Order, Look, AskTimelines-->  sched
    front  <--Tokenized, Detokenized, Done, Seen, Timelines--  text  <--Done, Seen, Timelines, Refused--  sched
                              fsm  --Compiled, Translated, CompileFailed-->  sched  --Compile, Discard-->  fsm
                                         fsm  --Masks, MatchFailed-->  sched  --Match, Unmatch-->  fsm
"""

from typing import TypeAlias

from .executor_messages import (
    Admit as Admit,
    Carried as Carried,
    DropGrammar as DropGrammar,
    DropImage as DropImage,
    ExecutorReady as ExecutorReady,
    Forget as Forget,
    GrammarStates as GrammarStates,
    Instruct as Instruct,
    LoadGrammar as LoadGrammar,
    Plan as Plan,
    Scores as Scores,
    SlotMasks as SlotMasks,
    SlotParams as SlotParams,
    StepOut as StepOut,
    Task as Task,
)
from .front_messages import (
    Action as Action,
    Cancel as Cancel,
    ChatPrompt as ChatPrompt,
    Chunk as Chunk,
    Chunks as Chunks,
    Detokenize as Detokenize,
    Detokenized as Detokenized,
    Generate as Generate,
    GrammarSpec as GrammarSpec,
    ImageFile as ImageFile,
    Order as Order,
    Prompt as Prompt,
    Refused as Refused,
    Resumed as Resumed,
    TextPrompt as TextPrompt,
    Tokenize as Tokenize,
    Tokenized as Tokenized,
    TokenLogprob as TokenLogprob,
    TokenPrompt as TokenPrompt,
    Unpin as Unpin,
    VideoFile as VideoFile,
)
from .fsm_messages import (
    Compile as Compile,
    Compiled as Compiled,
    CompileFailed as CompileFailed,
    Discard as Discard,
    Masks as Masks,
    Match as Match,
    MatchFailed as MatchFailed,
    Translated as Translated,
    Unmatch as Unmatch,
)
from .message import (
    NOTHING as NOTHING,
    ChunkEnd as ChunkEnd,
    Drain as Drain,
    Fence as Fence,
    Finish as Finish,
    Message as Message,
    PeerDown as PeerDown,
    PeerUp as PeerUp,
    RequestId as RequestId,
)
from .text_messages import (
    Abort as Abort,
    AbortNamed as AbortNamed,
    Done as Done,
    Ended as Ended,
    ImagePixels as ImagePixels,
    ImageSpan as ImageSpan,
    Pooled as Pooled,
    PromptLogprobs as PromptLogprobs,
    Started as Started,
    Submit as Submit,
    Tokens as Tokens,
)
from .view_messages import (
    NO_STATS as NO_STATS,
    AskTimelines as AskTimelines,
    LaneView as LaneView,
    Look as Look,
    NodeView as NodeView,
    RequestView as RequestView,
    Seen as Seen,
    Stats as Stats,
    Timelines as Timelines,
    TimelineView as TimelineView,
    WindowView as WindowView,
)

SystemMessage: TypeAlias = PeerUp | PeerDown | Drain
FrontAnswer: TypeAlias = Tokenized | Detokenized | Done | Seen | Timelines
FrontInbox: TypeAlias = SystemMessage | Chunks | Refused | Stats | FrontAnswer
FrontQuestion: TypeAlias = Tokenize | Detokenize | Order | Look | AskTimelines
TextInbox: TypeAlias = (
    SystemMessage | Generate | Cancel | Abort | AbortNamed | Unpin | FrontQuestion
    | Tokens | PromptLogprobs | Pooled | Started | Ended | Stats | Done | Seen | Timelines | Refused
)  # fmt: skip
GrammarNews: TypeAlias = Compiled | Translated | CompileFailed | Masks | MatchFailed
SchedulerInbox: TypeAlias = (
    SystemMessage | ImagePixels | Submit | Abort | Unpin | Order | Look | AskTimelines
    | ExecutorReady | StepOut | Carried | GrammarNews | Fence
)  # fmt: skip
ExecutorInbox: TypeAlias = SystemMessage | Plan | Instruct | Forget | ImagePixels | DropImage
SamplerMessage: TypeAlias = SlotParams | LoadGrammar | DropGrammar | GrammarStates | SlotMasks
SamplerInbox: TypeAlias = SystemMessage | SamplerMessage
FsmInbox: TypeAlias = SystemMessage | Compile | Discard | Match | Unmatch
