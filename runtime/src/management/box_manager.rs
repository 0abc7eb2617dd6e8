//! [`BoxManager`]: the maps of boxes, by id, name and container. Only maps: it stands under the one RwLock of
//! `RuntimeInnerImpl::sync_state`, is looked into and let go of, and never held across an await.
