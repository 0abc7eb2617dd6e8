//! Tests of `status` against the services over a real socket.

use super::*;
use crate::serve::tests::serve_fixture;
use std::process::Termination;

#[tokio::test]
async fn status_reports_the_daemon_behind_the_socket() {
    let serving = serve_fixture().await;
    let state = DaemonState::ask(&serving.socket).await.unwrap();
    let text = state.text(&serving.socket);
    for words in [
        "boxlite-cri",
        env!("BOXLITE_COMMIT"),
        "RuntimeReady",
        "NetworkReady   false: Network plugin returns error",
        "0 ready, 0 not ready",
        "0 running, 0 created, 0 exited",
    ] {
        assert!(text.contains(words), "{words} is missing:\n{text}");
    }
    let json = state.json(&serving.socket);
    assert_eq!(json["api"], "v1");
    assert_eq!(json["vmm"], "test");
    assert_eq!(json["pods"]["ready"], 0);
    assert_eq!(json["commit"], env!("BOXLITE_COMMIT"));
    serving.stop().await;
}

#[tokio::test]
async fn status_without_daemon_fails_and_names_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        listen: dir.path().join("none.sock"),
        ..Config::default()
    };
    let error = DaemonState::ask(&config.listen).await.unwrap_err();
    assert!(matches!(error, StatusError::NotRunning { .. }), "{error:?}");
    assert!(error.to_string().contains("none.sock"), "{error}");
    let code = status(config, Output::Text).await;
    assert_eq!(code.report(), ExitCode::FAILURE);
}
