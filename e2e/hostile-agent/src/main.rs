//! `boxlite-hostile-agent`: PID 1 of a VM that attacks its host, in place of the agent. Part of the tests only.
//!
//! [`boot::Boot`] selects how it starts. If it serves the guest protocol, its containers have no processes: the command of each
//! selects an [`attack::Attack`], which lasts from the container's start to its removal. It never powers the VM off.

mod attack;
mod boot;
mod container;
mod execution;
mod guest;
mod mounts;
mod serve;

use boot::Boot;

fn main() {
    let boot = Boot::of_this_program();
    eprintln!("boxlite-hostile-agent: {boot:?}");
    if boot == Boot::Silent {
        loop {
            std::thread::park();
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("failed to start the runtime");
    runtime.block_on(serve::serve(boot));
}
