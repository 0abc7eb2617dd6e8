//! Role *create*: libcontainer creates a container's init process, which stops before its exec.
//!
//! libcontainer enters the namespaces, mounts, pivots, changes the user, and waits on its notify socket. It does not
//! set cgroup limits (the agent does, as it also updates them), capabilities, no_new_privs and seccomp (see
//! [`super::confine`]; libcontainer's seccomp needs libseccomp, which a static build lacks), and does not look up or
//! execute the program (for typed errors and the exact environment, see [`Program`]).

use super::confine::Confined;
use super::detail::Detail;
use super::executable;
use super::wire::{self, Confinement, CreateRequest, Failure, FailureKind, Message};
use boxlite_sys::report::report;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;

/// Name of the socket in the bundle on which libcontainer sends the terminal's master.
const CONSOLE_SOCKET: &str = "console.sock";

/// Creates the process and reports its PID, and its terminal if it has one.
pub(crate) fn run(
    request: &CreateRequest,
    stdio: Vec<OwnedFd>,
    reply: &OwnedFd,
) -> Result<(), Failure> {
    let own_reply = reply
        .try_clone()
        .map_err(|error| Failure::step("duplicate a descriptor", error))?;
    let log = reply
        .try_clone()
        .map_err(|error| Failure::step("duplicate a descriptor", error))?;
    Detail::install(log, request.working_dir.clone());
    let failed = |error: libcontainer::error::LibcontainerError| {
        Failure::new(
            FailureKind::Internal,
            format!("failed to create container: {}", report(&error)),
        )
    };
    let mut builder = ContainerBuilder::new(request.id.clone(), SyscallType::default())
        .with_root_path(&request.state)
        .map_err(failed)?
        .with_executor(Program {
            reply: Rc::new(own_reply),
            confinement: Rc::new(request.confinement.clone()),
        })
        .validate_id()
        .map_err(failed)?;
    let mut listener = None;
    if request.terminal {
        let path = request.bundle.join(CONSOLE_SOCKET);
        listener = Some(
            UnixListener::bind(&path)
                .map_err(|error| Failure::step("bind the console socket", error))?,
        );
        builder = builder.with_console_socket(Some(path));
    } else {
        let mut stdio = stdio.into_iter();
        let (Some(stdin), Some(stdout), Some(stderr)) = (stdio.next(), stdio.next(), stdio.next())
        else {
            return Err(Failure::new(
                FailureKind::Internal,
                "standard streams are missing",
            ));
        };
        builder = builder
            .with_stdin(stdin)
            .with_stdout(stdout)
            .with_stderr(stderr);
    }
    let container = builder
        .as_init(&request.bundle)
        .with_systemd(false)
        .with_detach(true)
        // A child of the agent, like all processes.
        .as_sibling(true)
        .build()
        .map_err(failed)?;
    let pid = container
        .pid()
        .ok_or_else(|| Failure::new(FailureKind::Internal, "the container has no process"))?;
    if let Some(listener) = listener {
        hand_over_console(&listener, reply)?;
    }
    wire::send(reply.as_fd(), &Message::Created { pid: pid.as_raw() }, None)
        .map_err(|error| Failure::step("send the reply", error))
}

/// Receives the terminal's master, which libcontainer has sent, and passes it to the agent.
fn hand_over_console(listener: &UnixListener, reply: &OwnedFd) -> Result<(), Failure> {
    let (connection, _) = listener
        .accept()
        .map_err(|error| Failure::step("accept on the console socket", error))?;
    let mut name = [0; 64];
    let (_, mut descriptors) = wire::receive_with(connection.as_fd(), &mut name)
        .map_err(|error| Failure::step("receive the console", error))?;
    let master = descriptors
        .pop()
        .ok_or_else(|| Failure::new(FailureKind::Internal, "libcontainer sent no terminal"))?;
    wire::send(reply.as_fd(), &Message::Console, Some(master.as_fd()))
        .map_err(|error| Failure::step("send the reply", error))
}

/// Finds and executes the program instead of libcontainer's executor, which loses the order of the environment and
/// reports untyped errors. Failures are sent to the agent immediately; the exec closes the socket.
#[derive(Clone)]
struct Program {
    reply: Rc<OwnedFd>,
    confinement: Rc<Confinement>,
}

impl Program {
    fn report(&self, failure: Failure) -> String {
        let message = failure.message.clone();
        let _ = wire::send(self.reply.as_fd(), &Message::Failed(failure), None);
        message
    }

    fn parts(spec: &Spec) -> (Vec<String>, Vec<String>) {
        let process = spec.process().as_ref();
        let args = process
            .and_then(|process| process.args().clone())
            .unwrap_or_default();
        let env = process
            .and_then(|process| process.env().clone())
            .unwrap_or_default();
        (args, env)
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let (args, env) = Self::parts(spec);
        let name = args.first().map_or("", String::as_str);
        match executable::find(name, &env) {
            Ok(_) => Ok(()),
            Err(failure) => Err(ExecutorValidationError::ArgValidationError(
                self.report(failure),
            )),
        }
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The exec sets the program's environment.
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let (args, env) = Self::parts(spec);
        let confined = Confined::set(&self.confinement);
        let failure = match confined.and_then(|confined| confined.execute(&args, &env)) {
            Ok(never) => match never {},
            Err(failure) => failure,
        };
        Err(ExecutorError::Other(self.report(failure)))
    }
}
